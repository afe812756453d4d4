"""The steering formula, as pure functions of activations, code, autoencoder and multiplier."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..sae import FrozenSAE
from ..sae.weights import SAEWeights

Multiplier = float | Tensor


def dense_shift(h: Tensor, vector: Tensor, multiplier: Multiplier) -> tuple[Tensor, Tensor]:
    """Computes the shift by a plain vector: `multiplier * vector`, the same for every token.

    Args:
        h: Output of the layer, `(batch, seq, d_model)`.
        vector: The vector, `(d_model,)`, in float32.
        multiplier: Its factor, one for all or one per row, `(batch,)`.

    Returns:
        The shift of the activations, shaped and typed as `h`, and which tokens moved, `(batch, seq)`.

    Source: arXiv 2406.00045, the steered forward.
    """
    if isinstance(multiplier, Tensor):
        multiplier = multiplier.to(vector).view(-1, 1, 1)
    shift = (multiplier * vector).to(h.dtype)
    moved = shift.detach().ne(0).any(dim=-1, keepdim=True)
    return shift.expand_as(h), moved.expand_as(h)[..., 0]


def held_at(code: Tensor, features: Tensor) -> Tensor:
    """Computes how far features are from the values that a code holds them at, its entries; those below 0 mean 0."""
    return code.clamp(min=0) - features


def moved_features(features: Tensor, wanted: Tensor) -> Tensor:
    """Computes `ReLU(features + wanted) - features`: the wanted shift of each feature, or what cuts it to zero."""
    # In this order, so that NaN in a code does not pass for a cut feature.
    return torch.where(features + wanted <= 0, -features, wanted)


def steering_shift(
    h: Tensor, code: Tensor, sae: SAEWeights, multiplier: Multiplier, clamps: bool = False
) -> tuple[Tensor, Tensor]:
    """Computes what sparse steering adds to the output of a layer.

    The published forward is `Dec(ReLU(f + multiplier * code)) + (h - Dec(f))` with `f = Enc(h)`. The decoder is linear
    and its bias cancels, so that is `h + (ReLU(f + multiplier * code) - f) @ W_dec`. The difference is formed as
    `multiplier * code` where the feature stays on and `-f` where it is cut: the same values and the same gradient
    (none where `f + multiplier * code <= 0`, as ReLU'(0) = 0), exactly zero for a zero code, and no overflow.

    Args:
        h: Output of the layer, `(batch, seq, d_model)`.
        code: The learned vector, `(d_sae,)`, in float32.
        sae: The frozen autoencoder, on the device and in the dtype of `h`.
        multiplier: Factor of the code, one for all or one per row, `(batch,)`.
        clamps: Whether entries that are not zero are values to hold features at, instead of amounts to add: the forward
            is then that of `f + multiplier * (ReLU(code) - f)` for these features.

    Returns:
        The shift of the activations, shaped and typed as `h`, and the shift of each feature, `(batch, seq, d_sae)`.

    Source: arXiv 2601.08441, the sparse steering forward.
    """
    features, scale = sae.encode(h)
    features = features.to(code.dtype)
    if isinstance(multiplier, Tensor):
        multiplier = multiplier.to(code).view(-1, 1, 1)
    wanted = multiplier * (torch.where(code != 0, held_at(code, features), 0) if clamps else code)
    moved = moved_features(features, wanted)
    shift = moved.to(sae.W_dec.dtype) @ sae.W_dec
    if scale is not None:
        shift = shift * scale
    return shift.to(h.dtype), moved


def vector_of(code: Tensor, sae: FrozenSAE | None, sign: Literal[1, -1] | None = None) -> Tensor:
    """Sums decoder rows, weighted by the entries of a code: its shift at multiplier 1 if no feature is cut.

    Args:
        code: The code, `(d_sae,)`; without an SAE, the vector itself, `(d_model,)`.
        sae: Its autoencoder, of which only the rows of non-zero entries are read; None for a dense code.
        sign: Sum only entries of this sign, which shift every token alike at multipliers of this sign; None for all.
            A dense code does so at either sign.

    Returns:
        The vector, `(d_model,)` in float32, on the device of the code.
    """
    code = code.detach().to(torch.float32)
    if sae is None:
        return code
    # NaN has no sign: it stays, and spreads.
    code = code if sign is None else code.masked_fill(sign * code < 0, 0)
    support = code.nonzero().squeeze(-1)
    return code[support] @ sae.decoder_rows(support, code.device, torch.float32)
