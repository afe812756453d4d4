"""Vectors that the published code of BiPO and YaPO saved."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import AdapterFileError, ConfigError
from ..tuner import YaPOLayer
from ..tuner.adapters import adapter_of, write_code

_NAME = re.compile(r"layer_?(\d+)\D*\.pt")


def import_vectors(model: nn.Module, files: str | Path | Iterable[str | Path], adapter_name: str | None = None) -> None:
    """Gives an adapter the vectors of `vec_ep{epoch}_layer{block}.pt` files, entry by entry.

    The same layer is steered by the same amount as there: both count layers from 0 and steer the output of a layer, at
    all tokens (`positions="all"`) and at multiplier 1. A file holds neither the model nor the SAE; what the vector was
    trained on is for the caller to know.

    Args:
        model: A model with an adapter at these layers: for YaPO's a sparse one, with the SAE of the training; for
            BiPO's a dense one.
        files: One for each layer of the adapter, or the only one.
        adapter_name: The adapter; the active one if None.

    Raises:
        ConfigError: There is no such adapter, a file's name says no layer, or the layers differ from the adapter's.
        AdapterFileError: A file does not hold a vector, is not finite, or has another length than the adapter's.

    Source: `vec_ep{epoch}_layer{block}.pt` as written by the code of arXiv 2406.00045 and 2601.08441.
    """
    if isinstance(files, str | Path):
        files = [files]
    name, config, layers = adapter_of(model, adapter_name)
    by_block = {block_of(file): Path(file) for file in files}
    blocks = [layer.index for layer in layers]
    if sorted(by_block) != sorted(blocks):
        raise ConfigError(
            f"The files are of layers {sorted(by_block)}, and adapter {name!r} steers {blocks}: give a file for each."
        )
    vectors = {layer: _read(by_block[layer.index], layer, name, config.space) for layer in layers}
    for layer, vector in vectors.items():
        write_code(layer, name, vector)


def block_of(file: str | Path) -> int:
    """The layer that a file's name says.

    Raises:
        ConfigError: It says none.
    """
    match = _NAME.search(Path(file).name)
    if match is None:
        raise ConfigError(
            f"{str(file)!r} does not say its layer: name it as the published code does, vec_ep20_layer15.pt."
        )
    return int(match[1])


def _read(file: Path, layer: YaPOLayer, adapter_name: str, space: str) -> Tensor:
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {str(file)!r}.")
    try:
        # Tensors alone: a file of someone else could hold code otherwise.
        vector = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what it raises of a file that is something else has no common kind
        raise AdapterFileError(f"{str(file)!r} is not a tensor that torch saved: {error}") from error
    if not isinstance(vector, Tensor) or not vector.is_floating_point():
        raise AdapterFileError(f"{str(file)!r} holds a {type(vector).__name__}, and not one vector of floating point.")
    vector = vector.detach().float().squeeze()
    length = layer.yapo_code[adapter_name].shape
    if vector.shape != length:
        what = "features of the adapter's SAE" if space == "sae" else "entries of the residual stream"
        raise AdapterFileError(
            f"{str(file)!r} has shape {tuple(vector.shape)}, and layer {layer.index} takes the {length[0]} {what}: is "
            "it of this model, and of this SAE?"
        )
    if not vector.isfinite().all():
        raise AdapterFileError(f"{str(file)!r} has entries that are not finite: its training has diverged.")
    return vector
