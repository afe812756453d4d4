"""Imports vectors saved by the published BiPO and YaPO code."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import AdapterFileError, ConfigError
from ..tuner import YaPOLayer
from ..tuner.adapters import adapter_of, require_adding, write_codes

_NAME = re.compile(r"layer_?(\d+)\D*\.pt")


def import_vectors(model: nn.Module, files: str | Path | Iterable[str | Path], adapter_name: str | None = None) -> None:
    """Loads `vec_ep{epoch}_layer{layer}.pt` files into an adapter, unchanged.

    The adapter then steers exactly as the published code does at multiplier 1: both count layers from 0 and steer a
    layer's output, at all tokens (`positions="all"`). The files record neither the model nor the SAE, so make sure that
    these are the ones used in training.

    Args:
        model: A model with an adapter at the same layers: a dense one for BiPO, or for YaPO a sparse one with the SAE
            used in training.
        files: One file per layer of the adapter.
        adapter_name: The adapter; the active one if None.

    Raises:
        ConfigError: The adapter does not exist, a file name has no layer, or the files are for other layers.
        AdapterFileError: A file does not hold a vector, or its vector has the wrong length or is not finite.
        FileNotFoundError: A file does not exist.

    Source: The files written by the code of arXiv 2406.00045 and 2601.08441.
    """
    if isinstance(files, str | Path):
        files = [files]
    name, config, layers = adapter_of(model, adapter_name)
    require_adding(config, name, "import_vectors")
    by_layer = {layer_of(file): Path(file) for file in files}
    steered = [layer.index for layer in layers]
    if sorted(by_layer) != steered:
        raise ConfigError(
            f"The files are for layers {sorted(by_layer)}, but adapter {name!r} steers layers {steered}: pass one file "
            "per layer."
        )
    vectors = [_read(by_layer[layer.index], layer, name, config.space) for layer in layers]
    write_codes(model, name, layers, vectors)


def layer_of(file: str | Path) -> int:
    """Returns the layer in a file's name.

    Raises:
        ConfigError: The name has no layer.
    """
    match = _NAME.search(Path(file).name)
    if match is None:
        raise ConfigError(
            f"The file name {str(file)!r} has no layer: rename it as the published code does, to vec_ep20_layer15.pt."
        )
    return int(match[1])


def _read(file: Path, layer: YaPOLayer, adapter_name: str, space: str) -> Tensor:
    if not file.is_file():
        raise FileNotFoundError(f"The file {str(file)!r} does not exist.")
    try:
        # Otherwise, loading an untrusted file could run code.
        vector = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types for files that are not its own
        raise AdapterFileError(f"{str(file)!r} is not a file that torch.save wrote: {error}") from error
    if not isinstance(vector, Tensor) or not vector.is_floating_point():
        raise AdapterFileError(f"{str(file)!r} contains a {type(vector).__name__}: must be one floating-point tensor.")
    vector = vector.detach().float().squeeze()
    expected = layer.yapo_code[adapter_name].shape
    if vector.shape != expected:
        size, owner = ("d_sae", "SAE") if space == "sae" else ("d_model", "model")
        raise AdapterFileError(
            f"{str(file)!r} has shape {tuple(vector.shape)}, but layer {layer.index} has {size}={expected[0]}: use the "
            f"{owner} that the vector was trained on."
        )
    if not vector.isfinite().all():
        raise AdapterFileError(f"{str(file)!r} has entries that are not finite: training diverged; train it again.")
    return vector
