"""Chooses the features of a sparse code by a linear model of the gain and a quadratic one of the damage."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def select_features(
    gain: Tensor,
    metric: Tensor,
    products: Callable[[Tensor], Tensor],
    energies: Tensor,
    rows: Callable[[Tensor], Tensor],
    k: int,
) -> tuple[Tensor, Tensor]:
    """Orthogonal matching pursuit, with non-negative weights, of the shift that gains most for its damage.

    A small shift `u` of all tokens gains `gain @ u` and has a divergence of `u @ metric @ u / 2`, so the best one is
    along `metric^-1 gain`. This picks features one by one, each time the one whose decoder row, at its best weight,
    adds most to `gain @ u - u @ metric @ u / 2`, and then finds all weights anew. Features whose weight would be
    negative are dropped again.

    Args:
        gain: Gradient of the gain with respect to the shift, `(d,)`; several layers are concatenated.
        metric: The second derivative of the divergence with respect to the shift, `(d, d)`, positive definite.
        products: Maps a vector, `(d,)`, to its product with each feature's decoder row, `(features,)`.
        energies: `w @ metric @ w` of each feature's decoder row `w`, `(features,)`; infinite to leave a feature out.
        rows: Maps indices, `(n,)`, to decoder rows, `(n, d)`.
        k: Maximum number of features.

    Returns:
        Indices of the features, `(n,)` with `n <= k`, and their weights, `(n,)`, positive.
    """
    chosen = torch.zeros(0, dtype=torch.long, device=gain.device)
    weights = torch.zeros(0, device=gain.device)
    decoder = gain.new_zeros(0, len(gain))
    tried: set[int] = set()
    while len(chosen) < k:
        left = gain - metric @ (weights @ decoder)
        scores = products(left) / energies.sqrt()
        scores[list(tried)] = 0
        best = int(scores.argmax())
        if scores[best] <= 0:
            break
        tried.add(best)
        chosen = torch.cat([chosen, torch.tensor([best], device=chosen.device)])
        decoder = torch.cat([decoder, rows(chosen[-1:])])
        weights = _best_weights(gain, metric, decoder)
        chosen, decoder, weights = chosen[weights > 0], decoder[weights > 0], weights[weights > 0]
    return chosen, weights


def _best_weights(gain: Tensor, metric: Tensor, decoder: Tensor) -> Tensor:
    """The weights of chosen rows that gain most; 0 for those that would be negative."""
    curvature, slope = decoder @ metric @ decoder.T, decoder @ gain
    kept = torch.arange(len(decoder), device=gain.device)
    while len(kept):
        solved = torch.linalg.solve(curvature[kept][:, kept], slope[kept])
        if (solved > 0).all():
            return torch.zeros_like(slope).index_copy(0, kept, solved)
        kept = kept[solved > 0]
    return torch.zeros_like(slope)
