"""Writes adapters in the file formats of other programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .._utils import choice, replacing
from ..errors import ConfigError, UnsupportedOperationError
from ..tuner.adapters import adapter_of, require_adding
from ..tuner.blocks import base_of
from .constant import ConstantSteering, constant_steering

Format = Literal["gguf", "lm-eval", "neuronpedia", "safetensors", "vec"]
FORMATS: tuple[str, ...] = get_args(Format)
_SUFFIXES = {"gguf": ".gguf", "lm-eval": ".pt", "neuronpedia": ".json", "safetensors": ".safetensors", "vec": ""}


def export_adapter(
    model: nn.Module,
    path: str | Path,
    format: Format,
    multiplier: float = 1.0,
    texts: Iterable[Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    adapter_name: str | None = None,
    max_kl: float = 0.01,
    model_id: str | None = None,
    label: str | None = None,
    **options: Any,
) -> ConstantSteering | None:
    """Exports an adapter at one multiplier to the file format of another program.

    - "gguf": A control vector for llama.cpp, repeng and EasySteer. It cannot steer layer 0.
    - "lm-eval": The `.pt` file of lm-eval's model `steered`.
    - "neuronpedia": The bodies of `POST /api/vector/new`, one per layer, as JSON.
    - "safetensors": The plain vectors, as `block.{index}`, with the verdict in the metadata.
    - "vec": A folder with `vec_ep0_layer{index}.pt` files for the published code of BiPO and YaPO at its multiplier 1.
      For a sparse adapter, they contain the code, which the published code clips itself, so this is exact with the same
      SAE.

    Args:
        model: A `PeftModel` with a YaPO adapter.
        path: The output file; a folder for "vec".
        format: The format.
        multiplier: The multiplier, which the exported vectors include.
        texts: Calibration texts, needed if constant vectors are not exact; see `constant_steering`.
        tokenizer: The model's tokenizer; loaded by the model's name if None.
        adapter_name: The adapter; the active one if None.
        max_kl: Maximum KL of an approximation from the adapter's steering, in nats per token.
        model_id: Neuronpedia's name of the model, such as "gemma-2-2b-it"; the last part of the model's name if None.
        label: The vector's name on Neuronpedia; the adapter's name if None.
        **options: For `constant_steering`.

    Returns:
        The vectors and how exact they are; None for "vec", which is exact.

    Raises:
        ConfigError: The format or the adapter does not exist, or the path does not suit the format.
        UnsupportedOperationError: The format cannot express the steering, or its KL is above `max_kl`.
        ImportError: The gguf package is not installed, for "gguf".
    """
    path = Path(path)
    name, config, layers = adapter_of(model, adapter_name)
    choice(FORMATS, format=format)
    _require_suitable(path, format)
    if format == "vec":
        require_adding(config, name, "format='vec'")
        if config.positions != "all":
            raise UnsupportedOperationError(
                f"positions={config.positions!r} is not supported by format='vec', because the published code steers "
                "all tokens: use another format."
            )
        path.mkdir(parents=True, exist_ok=True)
        for layer in layers:
            with replacing(path / f"vec_ep0_layer{layer.index}.pt") as partial:
                torch.save((multiplier * layer.code(name).detach().float()).cpu(), partial)
        return None
    if format == "gguf" and any(layer.index == 0 for layer in layers):
        raise UnsupportedOperationError(
            "The adapter steers layer 0, which is not supported by format='gguf', because llama.cpp's control vectors "
            "start at layer 1: use another format."
        )
    found = constant_steering(model, multiplier, texts, tokenizer, adapter_name=name, **options)
    if found.kl is not None and not found.kl <= max_kl:
        raise UnsupportedOperationError(
            f"{found.verdict()} That is above max_kl={max_kl:g}: raise max_kl, use another multiplier, or serve the "
            "adapter itself."
        )
    base = base_of(model)
    model_name = getattr(base, "name_or_path", "") or config.base_model_name_or_path or ""
    paths = {module: path for path, module in base.base_model.named_modules()}
    names = _Names(
        str(base.config.model_type),
        model_id or Path(str(model_name)).name,
        label or name,
        {layer.index: paths[layer.block] for layer in layers},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        _WRITERS[format](partial, found, names)
    return found


def _require_suitable(path: Path, format: str) -> None:
    suffix = _SUFFIXES[format]
    if path.suffix != suffix:
        expected = f"a file name with the suffix {suffix!r}" if suffix else "a folder name without a suffix"
        raise ConfigError(f"path={str(path)!r}: must be {expected} for format={format!r}.")
    if suffix and path.is_dir():
        raise ConfigError(f"path={str(path)!r}: must be a file, but is a folder.")


@dataclass(frozen=True)
class _Names:
    """Names that the formats record.

    Attributes:
        model_type: The architecture, as transformers names it.
        model_id: The model.
        label: The adapter.
        layers: Each layer's module path in the model without its head, by index.
    """

    model_type: str
    model_id: str
    label: str
    layers: dict[int, str]


def _gguf(path: Path, found: ConstantSteering, names: _Names) -> None:
    try:
        from gguf import GGUFWriter
    except ImportError as error:
        raise ImportError("format='gguf' needs the gguf package: pip install gguf.") from error
    writer = GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", names.model_type)
    writer.add_uint32("controlvector.layer_count", len(found.vectors))
    for index, vector in found.vectors.items():
        writer.add_tensor(f"direction.{index}", vector.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _lm_eval(path: Path, found: ConstantSteering, names: _Names) -> None:
    step = {"steering_coefficient": 1.0, "action": "add", "bias": None, "head_index": None}
    torch.save({names.layers[index]: {"steering_vector": v, **step} for index, v in found.vectors.items()}, path)


def _neuronpedia(path: Path, found: ConstantSteering, names: _Names) -> None:
    bodies = [
        {
            "modelId": names.model_id,
            "layerNumber": index,
            "hookType": "hook_resid_post",
            "vector": vector.tolist(),
            "vectorDefaultSteerStrength": 1.0,
            "vectorLabel": names.label,
        }
        for index, vector in found.vectors.items()
    ]
    path.write_text(json.dumps(bodies), encoding="utf-8")


def _safetensors(path: Path, found: ConstantSteering, names: _Names) -> None:
    tensors: dict[str, Tensor] = {f"block.{index}": vector.contiguous() for index, vector in found.vectors.items()}
    save_file(tensors, path, metadata={"model": names.model_id, "adapter": names.label, "verdict": found.verdict()})


_WRITERS: dict[str, Callable[[Path, ConstantSteering, _Names], None]] = {
    "gguf": _gguf,
    "lm-eval": _lm_eval,
    "neuronpedia": _neuronpedia,
    "safetensors": _safetensors,
}
