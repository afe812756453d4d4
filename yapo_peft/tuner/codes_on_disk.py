"""Codes as they are saved: the indices and values of their non-zero entries."""

from __future__ import annotations

import re

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..errors import AdapterFileError

_INDICES, _VALUES = ".indices", ".values"
_PACKED = re.compile(r"(?P<code>.*\.(?P<layer>\d+)\.yapo\.yapo_code)(?P<part>\.indices|\.values)")


def pack_codes(codes: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replaces each code by its non-zero entries.

    Args:
        codes: Codes by their names in the model, `(d_sae,)` each.

    Returns:
        For each code, `<name>.indices` (int32, ascending) and `<name>.values` (float32).
    """
    packed = {}
    for name, code in codes.items():
        code = whole(code)
        indices = code.nonzero().squeeze(-1)
        packed[name + _INDICES] = indices.to(torch.int32)
        packed[name + _VALUES] = code[indices].to(torch.float32)
    return packed


def whole(code: Tensor) -> Tensor:
    """A code, `(d_sae,)`, also where FSDP2 or ZeRO-3 keep a part of it in each process; all of them must ask."""
    if isinstance(code, DTensor):
        return code.full_tensor().detach()
    if hasattr(code, "ds_id"):
        import deepspeed  # pyright: ignore[reportMissingImports]

        with deepspeed.zero.GatheredParameters([code]):
            return code.detach().clone()
    return code.detach()


def unpack_codes(packed: dict[str, Tensor], widths: dict[int, int]) -> dict[int, Tensor]:
    """Restores the codes that `pack_codes` packed.

    Args:
        packed: The tensors of an adapter's file, by the names in it.
        widths: Number of features of each steered layer, by the index of its block.

    Returns:
        Codes by the index of the block, `(d_sae,)` each in float32.

    Raises:
        AdapterFileError: A tensor is missing, unknown, or has a type, shape or index that does not fit.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    layers: dict[str, int] = {}
    for name, tensor in packed.items():
        match = _PACKED.fullmatch(name)
        if match is None:
            raise AdapterFileError(
                f"The adapter's file holds {name!r}, which is no YaPO code: was it saved by another PEFT method?"
            )
        parts.setdefault(match["code"], {})[match["part"]] = tensor
        layers[match["code"]] = int(match["layer"])
    if sorted(layers.values()) != sorted(widths):
        raise AdapterFileError(
            f"The adapter's file holds codes for layers {sorted(layers.values())}, its config steers {sorted(widths)}."
        )
    return {layer: _unpack(name, parts[name], widths[layer]) for name, layer in layers.items()}


def _unpack(name: str, parts: dict[str, Tensor], width: int) -> Tensor:
    if len(parts) < 2:
        raise AdapterFileError(f"The adapter's file holds {', '.join(parts)} of {name!r} but not the other half.")
    indices, values = parts[_INDICES], parts[_VALUES]
    if indices.dim() != 1 or indices.shape != values.shape:
        raise AdapterFileError(
            f"{name!r} has indices of shape {tuple(indices.shape)} and values of shape {tuple(values.shape)}; both "
            "must be (non-zeros,)."
        )
    if indices.dtype.is_floating_point or not values.dtype.is_floating_point:
        raise AdapterFileError(
            f"{name!r} has {indices.dtype} indices and {values.dtype} values; expected int32, float32."
        )
    outside = indices[(indices < 0) | (indices >= width)]
    if outside.numel():
        raise AdapterFileError(
            f"{name!r} names feature {int(outside[0])}, but its SAE has {width}: the file belongs to another SAE."
        )
    if indices.unique().numel() != indices.numel():
        raise AdapterFileError(f"{name!r} names a feature twice.")
    if not values.isfinite().all():
        raise AdapterFileError(f"{name!r} holds values that are NaN or infinite.")
    code = torch.zeros(width, dtype=torch.float32, device=values.device)
    code[indices.long()] = values.to(torch.float32)
    return code
