"""Differentiable steering whose shift and gradient only touch active features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..sae.weights import SAEWeights
from .formula import Multiplier

# Rows of the decoder that are held at once.
_CHUNK = 16384
# Entries of a matrix of tokens and features that are held at once.
_ENCODED = 2**24


@dataclass(frozen=True)
class ActiveFeatures:
    """The active features of each token, as the non-zeros of a sparse matrix of tokens and features.

    Attributes:
        token: Index of the token in the flattened batch, `(nnz,)`, ascending.
        feature: Index of the feature, `(nnz,)`.
        value: Its activation, `(nnz,)`, in float32.
        scale: Factor of the decoder's output at each token, `(tokens, 1)`, or None if it is one.
    """

    token: Tensor
    feature: Tensor
    value: Tensor
    scale: Tensor | None

    @classmethod
    @torch.no_grad()
    def of(cls, h: Tensor, sae: SAEWeights) -> ActiveFeatures:
        """Encodes the output of a layer, `(batch, seq, d_model)`."""
        tokens = h.reshape(-1, h.shape[-1])
        size = max(1, _ENCODED // sae.d_sae)
        parts = []
        for start in range(0, max(len(tokens), 1), size):
            features, _ = sae.encode(tokens[start : start + size])
            token, feature = features.nonzero(as_tuple=True)
            parts.append((token + start, feature, features[token, feature].float()))
        token, feature, value = (torch.cat(column) for column in zip(*parts, strict=True))
        _, scale = sae.normalize(tokens)
        return cls(token, feature, value, scale)

    @classmethod
    def none(cls, device: torch.device) -> ActiveFeatures:
        """Returns no active features."""
        index = torch.zeros(0, dtype=torch.long, device=device)
        return cls(index, index, torch.zeros(0, device=device), None)

    def at(self, tokens: Tensor, count: int) -> ActiveFeatures:
        """Selects tokens, of `count`, in any order; they may repeat, and -1 has no active features."""
        counts = self.token.bincount(minlength=count)
        starts = counts.cumsum(0) - counts
        counts = torch.where(tokens < 0, 0, counts[tokens])
        before = counts.cumsum(0) - counts
        token = torch.arange(len(tokens), device=tokens.device).repeat_interleave(counts)
        here = torch.arange(len(token), device=tokens.device) - before[token] + starts[tokens[token]]
        return ActiveFeatures(token, self.feature[here], self.value[here], self.scale)


def sparse_shift(
    h: Tensor, code: Tensor, W_dec: Tensor, multiplier: Multiplier, active: ActiveFeatures
) -> tuple[Tensor, Tensor]:
    """As `steering_shift`, but differentiable with respect to the code only.

    Args:
        h: Output of the layer, `(batch, seq, d_model)`.
        code: The learned vector, `(d_sae,)`, in float32.
        W_dec: The decoder of the autoencoder, `(d_sae, d_model)`, on the device and in the dtype of `h`.
        multiplier: Factor of the code, one for all or one per row, `(batch,)`.
        active: The active features of `h`.

    Returns:
        The shift of the activations, shaped and typed as `h`, and which tokens have a moved feature, `(batch, seq)`.

    Source: arXiv 2601.08441, the sparse steering forward; the identities are those of `steering_shift`.
    """
    batch, seq, width = h.shape
    rows = multiplier if isinstance(multiplier, Tensor) else torch.full((batch,), float(multiplier))
    per_token = rows.to(h.device, torch.float32).repeat_interleave(seq)
    with torch.autocast(h.device.type, enabled=False):
        shift, moved = _SparseShift.apply(code, per_token, active, W_dec)  # pyright: ignore
    if active.scale is not None:
        shift = shift * active.scale
    return shift.to(h.dtype).view(batch, seq, width), moved.view(batch, seq)


class _SparseShift(torch.autograd.Function):
    """Entries with `multiplier * code > 0` shift all tokens alike, those below 0 where their feature is active.

    The gradient of an entry of the first kind is the sum of all tokens' gradients along its decoder row. Any other
    entry, including zeros, gets its gradient from tokens where its feature is active and not cut.
    """

    @staticmethod
    def forward(
        ctx: Any, code: Tensor, multiplier: Tensor, active: ActiveFeatures, W_dec: Tensor
    ) -> tuple[Tensor, Tensor]:
        support = code.nonzero().squeeze(-1)
        entries = code[support]
        rows = W_dec[support].to(torch.float32)
        # What is raised at a positive multiplier, and what at a negative one; NaN is in both.
        up = torch.where(entries < 0, 0.0, entries) @ rows
        down = torch.where(entries > 0, 0.0, entries) @ rows
        factor = multiplier[:, None]
        # Chosen, not multiplied by zero, so that an infinite entry of one sign leaves the other direction alone.
        shift = torch.where(factor > 0, factor * up, 0.0) + torch.where(factor < 0, factor * down, 0.0)
        wanted = multiplier[active.token] * code[active.feature]
        cut = (wanted < 0).nonzero().squeeze(-1)
        moved = -torch.minimum(active.value[cut], -wanted[cut])
        _add_rows(shift, active.token[cut], W_dec, active.feature[cut], moved)
        raised = ((multiplier > 0) & (entries > 0).any()) | ((multiplier < 0) & (entries < 0).any())
        raised[active.token[cut]] = True
        learning = (~(wanted > 0) & (active.value + wanted > 0)).nonzero().squeeze(-1)
        ctx.save_for_backward(code, multiplier, W_dec, support, active.token[learning], active.feature[learning])
        ctx.mark_non_differentiable(raised)
        return shift, raised

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        code, multiplier, W_dec, support, token, feature = ctx.saved_tensors
        gradient = gradients[0].float() * multiplier[:, None]
        result = torch.zeros_like(code)
        rows, entries = W_dec[support].to(torch.float32), code[support]
        up = rows @ gradient[multiplier > 0].sum(dim=0)
        down = rows @ gradient[multiplier < 0].sum(dim=0)
        result[support] = torch.where(entries > 0, up, down)
        # Summed over tokens first, so that each feature's decoder row is read once.
        features, position = feature.unique(return_inverse=True)
        along = torch.zeros(len(features), gradient.shape[1], device=gradient.device)
        _add_rows(along, position, gradient, token)
        result[features] += (along * W_dec[features]).sum(dim=-1)
        return result, None, None, None


def _add_rows(total: Tensor, at: Tensor, rows: Tensor, which: Tensor, weights: Tensor | None = None) -> None:
    """Adds chosen rows of a matrix, weighted, to chosen rows of `total`, in float32."""
    for start in range(0, len(at), _CHUNK):
        part = slice(start, start + _CHUNK)
        chosen = rows[which[part]].to(total.dtype)
        if weights is not None:
            chosen = chosen * weights[part, None]
        total.index_add_(0, at[part], chosen)
