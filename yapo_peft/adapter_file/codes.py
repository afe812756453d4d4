"""Packs codes for files: sparse ones as non-zero entries with the hash of their SAE, dense ones as they are."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from .._utils import whole
from ..errors import AdapterFileError, SAEMismatchError
from ..sae.identity import SAEIdentity

_INDICES, _VALUES, _SAE = ".indices", ".values", ".sae"
_PACKED = re.compile(r"(?P<code>.*\.(?P<layer>\d+)\.yapo\.yapo_code)(?P<part>\.indices|\.values|\.sae|\.part_\w+)")


def pack_codes(codes: dict[str, Tensor], saes: dict[str, SAEIdentity | None]) -> dict[str, Tensor]:
    """Packs codes, sparse ones as their non-zero entries.

    Args:
        codes: Codes by their names in the model, `(d_sae,)` or `(d_model,)` each.
        saes: The SAE of each code, None for dense ones.

    Returns:
        For each sparse code, `<name>.indices` (int32, ascending), `<name>.values` (float32) and `<name>.sae` (uint8,
        the hash of the SAE, in case the config beside the file is replaced); for dense ones only the values.
    """
    packed = {}
    for name, code in codes.items():
        code, sae = whole(code), saes[name]
        if sae is None:
            packed[name + _VALUES] = code.to(torch.float32)
            continue
        indices = code.nonzero().squeeze(-1)
        packed[name + _INDICES] = indices.to(torch.int32)
        packed[name + _VALUES] = code[indices].to(torch.float32)
        packed[name + _SAE] = _hash(sae)
    return packed


def unpack_codes(packed: dict[str, Tensor], saes: Mapping[int, SAEIdentity | None], d_model: int) -> dict[int, Tensor]:
    """Restores the codes that `pack_codes` packed.

    Args:
        packed: The tensors of an adapter's file, by their names there; those of SAE parts are left alone.
        saes: The SAE of each steered layer, by the layer's index; None for dense codes.
        d_model: The size of dense codes.

    Returns:
        Codes by the layer's index, `(d_sae,)` or `(d_model,)` each in float32.

    Raises:
        AdapterFileError: A tensor is missing, unknown, or has a type, shape or index that does not fit.
        SAEMismatchError: A code was saved with another SAE.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    layers: dict[str, int] = {}
    for name, tensor in packed.items():
        match = _PACKED.fullmatch(name)
        if match is None:
            raise AdapterFileError(
                f"The adapter's file holds {name!r}, which is not a YaPO code: was it saved by another PEFT method?"
            )
        parts.setdefault(match["code"], {})[match["part"]] = tensor
        layers[match["code"]] = int(match["layer"])
    if sorted(layers.values()) != sorted(saes):
        raise AdapterFileError(
            f"The adapter's file holds codes for layers {sorted(layers.values())}, its config steers {sorted(saes)}."
        )
    return {layer: _unpack(name, parts[name], saes[layer], d_model) for name, layer in layers.items()}


def _unpack(name: str, parts: dict[str, Tensor], sae: SAEIdentity | None, d_model: int) -> Tensor:
    found, expected = parts.keys() & {_INDICES, _VALUES, _SAE}, {_VALUES} if sae is None else {_INDICES, _VALUES, _SAE}
    if found != expected:
        raise AdapterFileError(
            f"The adapter's file holds {', '.join(sorted(found))} of {name!r}, but its config, with "
            f"space={'dense' if sae is None else 'sae'!r}, needs {', '.join(sorted(expected))}."
        )
    code = _unpack_dense(name, parts[_VALUES], d_model) if sae is None else _unpack_sparse(name, parts, sae)
    if not code.isfinite().all():
        raise AdapterFileError(f"{name!r} holds values that are NaN or infinite.")
    return code


def _unpack_dense(name: str, values: Tensor, d_model: int) -> Tensor:
    if values.shape != (d_model,) or not values.dtype.is_floating_point:
        raise AdapterFileError(
            f"{name!r} has {values.dtype} values of shape {tuple(values.shape)}; expected float32, {(d_model,)}: the "
            "file belongs to another model."
        )
    return values.to(torch.float32)


def _unpack_sparse(name: str, parts: dict[str, Tensor], sae: SAEIdentity) -> Tensor:
    indices, values, width = parts[_INDICES], parts[_VALUES], sae.d_sae
    if not torch.equal(parts[_SAE].cpu(), _hash(sae)):
        raise SAEMismatchError(
            f"{name!r} was saved with the SAE of hash {bytes(parts[_SAE].tolist()).hex()[:12]}, and is loaded onto one "
            f"of hash {sae.content_hash[:12]}: a code is only valid for the SAE that it was "
            "trained with."
        )
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
    code = torch.zeros(width, dtype=torch.float32, device=values.device)
    code[indices.long()] = values.to(torch.float32)
    return code


def _hash(sae: SAEIdentity) -> Tensor:
    return torch.tensor(list(bytes.fromhex(sae.content_hash)), dtype=torch.uint8)
