"""The files of other programs."""

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

from .._utils import replacing
from ..errors import ConfigError, UnsupportedOperationError
from ..interpret.texts import base_of
from ..tuner.adapters import adapter_of
from .constant import ConstantSteering, constant_steering

Format = Literal["gguf", "lm-eval", "neuronpedia", "safetensors", "vec"]
FORMATS: tuple[str, ...] = get_args(Format)
_ENDINGS = {"gguf": ".gguf", "lm-eval": ".pt", "neuronpedia": ".json", "safetensors": ".safetensors", "vec": ""}


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
    """Writes an adapter at one multiplier as a file of another program.

    - "gguf": a control vector of llama.cpp, repeng and EasySteer. It cannot steer the lowest layer.
    - "lm-eval": the `.pt` file of lm-eval's model `steered`.
    - "neuronpedia": the bodies of `POST /api/vector/new`, one for each layer.
    - "safetensors": `block.{index}`, the plain vectors, with the verdict in the metadata.
    - "vec": a folder with `vec_ep0_layer{index}.pt` for the published code of BiPO and YaPO at its multiplier 1. Of a
      sparse adapter that is the code, which the code there clips by itself: exact, with the same SAE.

    Args:
        model: A `PeftModel` with a YaPO adapter.
        path: The file, or for "vec" the folder.
        format: One of these.
        multiplier: The multiplier, which is part of the file.
        texts: For calibration, where no constant is exact; see `constant_steering`.
        tokenizer: The model's.
        adapter_name: The adapter; the active one if None.
        max_kl: An approximation further from the true steering than this, in nats per token, is refused.
        model_id: Neuronpedia's name of the model, such as "gemma-2-2b-it"; the name's last part if None.
        label: What Neuronpedia calls the vector; the adapter's name if None.
        **options: For `constant_steering`.

    Returns:
        The vectors and how exact they are; None for "vec", which is exact.

    Raises:
        ConfigError: There is no such format or adapter, or the path has another ending.
        UnsupportedOperationError: The format cannot express it, or its KL is above `max_kl`.
        ImportError: gguf is not installed, for "gguf".
    """
    path = Path(path)
    name, config, layers = adapter_of(model, adapter_name)
    _require_writable(path, format)
    if format == "vec":
        if config.positions != "all":
            raise UnsupportedOperationError(f"positions={config.positions!r}: the published code steers all tokens.")
        path.mkdir(parents=True, exist_ok=True)
        for layer in layers:
            with replacing(path / f"vec_ep0_layer{layer.index}.pt") as partial:
                torch.save((multiplier * layer.code(name).detach().float()).cpu(), partial)
        return None
    if format == "gguf" and any(layer.index == 0 for layer in layers):
        raise UnsupportedOperationError("Layer 0 is steered, which a GGUF control vector cannot express.")
    found = constant_steering(model, multiplier, texts, tokenizer, adapter_name=name, **options)
    if found.kl is not None and not found.kl <= max_kl:
        raise UnsupportedOperationError(
            f"{found.verdict()} That is above max_kl={max_kl:g}: allow more, take another multiplier, or serve the "
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


def _require_writable(path: Path, format: str) -> None:
    if format not in FORMATS:
        raise ConfigError(f"format={format!r}: choose one of {', '.join(map(repr, FORMATS))}.")
    if path.suffix != _ENDINGS[format]:
        wanted = f"a file that ends in {_ENDINGS[format]!r}" if _ENDINGS[format] else "a folder, without an ending"
        raise ConfigError(f"path={str(path)!r}: {format!r} is {wanted}.")
    if _ENDINGS[format] and path.is_dir():
        raise ConfigError(f"path={str(path)!r} is a folder: name a file.")


@dataclass(frozen=True)
class _Names:
    """What files call things.

    Attributes:
        model_type: transformers' name of the architecture.
        model_id: The model.
        label: The adapter.
        blocks: Path of each layer within the model without its head, by its index.
    """

    model_type: str
    model_id: str
    label: str
    blocks: dict[int, str]


def _gguf(path: Path, found: ConstantSteering, names: _Names) -> None:
    try:
        from gguf import GGUFWriter
    except ImportError as error:
        raise ImportError("Control vectors need gguf: pip install gguf.") from error
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
    torch.save({names.blocks[index]: {"steering_vector": v, **step} for index, v in found.vectors.items()}, path)


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
