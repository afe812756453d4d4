"""Packs the parts of autoencoders that self-contained adapters carry in their files."""

from __future__ import annotations

import json
import warnings
from typing import Any, get_args

import torch
from torch import Tensor

from .._utils import hash_tensors
from ..errors import AdapterFileError
from ..sae import FrozenSAE, SAEIdentity, SAEWeights
from ..sae.weights import Activation, Normalization

# One word: PEFT takes the name of the adapter out of the place before the last dot.
_PART = ".part_"
_SETTINGS = "settings"


def pack_part(name: str, packed: dict[str, Tensor], sae: FrozenSAE, clamps: bool = False) -> dict[str, Tensor]:
    """Packs the part of an SAE that steering with a code needs.

    Element-wise encoders only need the columns of the code's features, and steer with them at any multiplier. A TopK
    encoder needs all columns, but only to lower features: it is left out if that happens at multipliers of one sign.

    Args:
        name: Name of the code.
        packed: The packed code, with `<name>.indices` and `<name>.values`.
        sae: Its autoencoder.
        clamps: Whether the code holds features at values, and so needs their activations at all multipliers.

    Returns:
        `<name>.part_W_dec`, `(n, d_in)`, and so on, in the SAE's dtype, and `<name>.part_settings` (JSON as uint8).

    Warns:
        UserWarning: The whole encoder of a TopK SAE is packed.
    """
    indices, values = packed[f"{name}.indices"].long().cpu(), packed[f"{name}.values"]
    cpu = torch.device("cpu")
    one_sign = not ((values > 0).any() and (values < 0).any())
    if sae.activation == "topk" and one_sign and not clamps:
        part = sae.select(indices[:0], cpu, sae.dtype)
        tensors = {"W_dec": sae.decoder_rows(indices, cpu, sae.dtype)}
    else:
        part = sae.select(indices, cpu, sae.dtype)
        tensors = {key: value for key, value in part.tensors() if key != "selected"}
        if sae.activation == "topk":
            moved = "holds features at values" if clamps else "both raises and lowers features"
            fix = " yapo_peft.methods.convert_to_jumprelu (yapo convert) makes it a few kilobytes per feature."
            warnings.warn(
                f"The adapter's file gets the whole encoder of a TopK SAE ({part.W_enc.nbytes / 1e6:.0f} MB), because "
                f"its code {moved}.{'' if clamps else fix}",
                UserWarning,
                stacklevel=2,
            )
    settings = {"activation": part.activation, "k": part.k, "normalization": part.normalization}
    settings["sha256"] = _digest(tensors, settings, indices, sae.identity)
    encoded = torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)
    return {f"{name}{_PART}{key}": value.contiguous() for key, value in (tensors | {_SETTINGS: encoded}).items()}


def unpack_part(layer: int, tensors: dict[str, Tensor], sae: SAEIdentity) -> tuple[Tensor, SAEWeights]:
    """Unpacks what `pack_part` packed: the features, `(n,)`, and their weights.

    Args:
        layer: Index of the steered layer.
        tensors: The tensors of an adapter's file, by their names there.
        sae: Identity of the whole autoencoder.

    Raises:
        AdapterFileError: A tensor is missing or damaged, or has a shape that does not fit.
    """
    code = f".{layer}.yapo.yapo_code"
    indices = next(tensor for name, tensor in tensors.items() if name.endswith(f"{code}.indices")).cpu()
    part = {name.split(_PART)[1]: tensor.cpu() for name, tensor in tensors.items() if code + _PART in name}
    try:
        settings = json.loads(bytes(part.pop(_SETTINGS).tolist()))
        activation, normalization, recorded = (settings[key] for key in ("activation", "normalization", "sha256"))
        digest = _digest(part, settings, indices, sae)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise AdapterFileError(
            f"The adapter's config says self_contained=True, but its file has no valid part for layer "
            f"{layer} ({type(error).__name__}: {error}). Save the adapter again, or set self_contained to false, in "
            "adapter_config.json or in the model's peft_config, to use the whole SAE."
        ) from error
    is_known = activation in get_args(Activation) and normalization in get_args(Normalization)
    if not is_known or digest != recorded or not _fits(part, activation, len(indices), sae):
        raise AdapterFileError(
            f"The SAE's part for layer {layer} is not what was saved with this code: tensors are damaged, missing, or "
            "of another layer. Save or download the adapter again."
        )
    selected: Tensor | None = None
    if activation == "topk" and "W_enc" in part:
        selected = indices.long()
    elif activation == "topk":
        part |= {"W_enc": torch.empty(sae.d_in, 0), "b_enc": torch.empty(0)}
    return indices, SAEWeights(
        **part, activation=activation, k=settings["k"], normalization=normalization, selected=selected
    )


def _fits(part: dict[str, Tensor], activation: Activation, n: int, sae: SAEIdentity) -> bool:
    """Whether tensors are finite, and those of an encoder and a decoder of `n` features."""
    d_in = sae.d_in
    shapes: dict[str, tuple[int, ...]] = {"W_dec": (n, d_in)}
    # The features of a TopK SAE compete with all others.
    columns = sae.d_sae if activation == "topk" else n
    if activation != "topk" or "W_enc" in part:
        shapes |= {"W_enc": (d_in, columns), "b_enc": (columns,)}
    own = {"jumprelu": ("threshold",), "gated": ("magnitude_scale", "magnitude_bias")}
    shapes |= {name: (n,) for name in own.get(activation, ())}
    optional = {"b_in": (d_in,)} if "b_in" in part else {}
    return {name: tuple(tensor.shape) for name, tensor in part.items()} == shapes | optional and all(
        tensor.is_floating_point() and bool(tensor.isfinite().all()) for tensor in part.values()
    )


def _digest(tensors: dict[str, Tensor], settings: dict[str, Any], indices: Tensor, sae: SAEIdentity) -> str:
    """SHA-256 over a part, its features, and the hash of its SAE, in hexadecimal."""
    head = json.dumps([settings["activation"], settings["k"], settings["normalization"], sae.content_hash])
    return hash_tensors(head, sorted({**tensors, "indices": indices.to(torch.int32)}.items()))
