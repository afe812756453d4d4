"""Packs codes for files: sparse ones as non-zero entries with the hash of their SAE, dense ones as they are."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from .._utils import hash_tensors, whole
from ..errors import AdapterFileError, SAEMismatchError
from ..sae.identity import SAEIdentity

_INDICES, _VALUES, _SAE, _DIGEST = ".indices", ".values", ".sae", ".digest"
_OF_SPACE = {"sae": (_INDICES, _VALUES, _SAE, _DIGEST), "dense": (_VALUES, _DIGEST)}
_PACKED = re.compile(
    r"(?P<code>.*\.(?P<layer>\d{1,9})\.yapo\.yapo_code)(?P<part>\.indices|\.values|\.sae|\.digest|\.part_\w+)"
)


def pack_codes(codes: dict[str, Tensor], saes: dict[str, SAEIdentity | None]) -> dict[str, Tensor]:
    """Packs codes, sparse ones as their non-zero entries.

    Args:
        codes: Codes by their names in the model, `(d_sae,)` or `(d_model,)` each.
        saes: The SAE of each code, None for dense ones.

    Returns:
        For each sparse code, `<name>.indices` (int32, ascending), `<name>.values` (float32), `<name>.sae` (uint8, the
        hash of the SAE, in case the config beside the file is replaced) and `<name>.digest` (uint8, a hash of these
        three); for dense ones only the values and the digest.

    Raises:
        AdapterFileError: A code holds NaN or infinity.
    """
    packed = {}
    for name, code in codes.items():
        code, sae = whole(code).to(torch.float32), saes[name]
        if not code.isfinite().all():
            raise AdapterFileError(f"{name!r} holds values that are NaN or infinite, so it cannot be saved.")
        parts = {_VALUES: code}
        if sae is not None:
            indices = code.nonzero().squeeze(-1)
            parts = {_INDICES: indices.to(torch.int32), _VALUES: code[indices], _SAE: _as_bytes(sae.content_hash)}
        parts[_DIGEST] = _digest(parts)
        packed |= {name + part: tensor for part, tensor in parts.items()}
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
        AdapterFileError: A tensor is missing, unknown or damaged, or has a type, shape or index that does not fit.
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
    space = "dense" if sae is None else "sae"
    parts = {part: tensor.cpu() for part, tensor in parts.items() if part in _OF_SPACE["sae"]}
    if sorted(parts) != sorted(_OF_SPACE[space]):
        raise AdapterFileError(
            f"The adapter's file holds {', '.join(sorted(parts))} of {name!r}, but its config, with {space=}, needs "
            f"{', '.join(sorted(_OF_SPACE[space]))}."
        )
    count = d_model if sae is None else parts[_INDICES].numel()
    expected = {_VALUES: (torch.float32, count), _DIGEST: (torch.uint8, 32)}
    expected |= {} if sae is None else {_INDICES: (torch.int32, count), _SAE: (torch.uint8, 32)}
    for part, (dtype, size) in expected.items():
        tensor = parts[part]
        if tensor.dtype != dtype or tensor.shape != (size,):
            raise AdapterFileError(
                f"{name + part!r} is {tensor.dtype} of shape {tuple(tensor.shape)}; expected {dtype}, {(size,)}: the "
                "file is damaged, or belongs to another model."
            )
    if sae is not None and not torch.equal(parts[_SAE], _as_bytes(sae.content_hash)):
        raise SAEMismatchError(
            f"{name!r} was saved with the SAE of hash {bytes(parts[_SAE].tolist()).hex()[:12]}, and is loaded onto one "
            f"of hash {sae.content_hash[:12]}: a code is only valid for the SAE that it was "
            "trained with."
        )
    if not torch.equal(parts[_DIGEST], _digest(parts)):
        raise AdapterFileError(
            f"{name!r} is not what was saved: its digest does not fit. Save or download the adapter again."
        )
    code = parts[_VALUES] if sae is None else _spread(name, parts[_INDICES], parts[_VALUES], sae.d_sae)
    if not code.isfinite().all():
        raise AdapterFileError(f"{name!r} holds values that are NaN or infinite.")
    return code


def _spread(name: str, indices: Tensor, values: Tensor, width: int) -> Tensor:
    outside = indices[(indices < 0) | (indices >= width)]
    if outside.numel():
        raise AdapterFileError(
            f"{name!r} names feature {int(outside[0])}, but its SAE has {width}: the file belongs to another SAE."
        )
    if indices.unique().numel() != indices.numel():
        raise AdapterFileError(f"{name!r} names a feature twice.")
    return torch.zeros(width).index_copy(0, indices.long(), values)


def _digest(parts: Mapping[str, Tensor]) -> Tensor:
    return _as_bytes(hash_tensors("", sorted((part, tensor) for part, tensor in parts.items() if part != _DIGEST)))


def _as_bytes(digest: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8)
