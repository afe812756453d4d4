"""Chooses the features of a sparse code by a linear model of the gain and a quadratic one of the damage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# The share of the gain below which a feature adds nothing.
_NEGLIGIBLE = 1e-6
# How much a second moment is shrunk at least: few or equal samples seem to have no error.
_SHARE = 0.01


@dataclass(frozen=True)
class Metric:
    """The damage of shifts: `factor.T @ factor + ridge * I`, a matrix of `(d, d)` that is never formed.

    Attributes:
        factor: `(n, d)`, with fewer rows than columns.
        ridge: A positive number.
    """

    factor: Tensor
    ridge: float

    @classmethod
    def of(cls, samples: Tensor) -> Metric:
        """The second moment of samples, `(n, d)`, shrunk towards a multiple of the identity.

        It is shrunk by the share that minimises the expected error, because there are fewer samples than dimensions.

        Source: Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", 2004.
        """
        n, d = samples.shape
        inner = samples @ samples.T / n
        scale, square = float(inner.trace()) / d, float(inner.square().sum())
        # Squared distances: of the moment from the multiple of the identity, and of `x x^T` from the moment, over n.
        distance, noise = square - d * scale**2, float(inner.diagonal().square().sum()) - square / n
        share = min(max(noise / distance, _SHARE), 1.0) if distance > 0 else 1.0
        # Where nothing does damage, all shifts count alike.
        return cls(((1 - share) / n) ** 0.5 * samples, share * scale or 1.0)

    def product(self, vectors: Tensor) -> Tensor:
        """The product with vectors, `(..., d)`."""
        return vectors @ self.factor.T @ self.factor + self.ridge * vectors

    def energies(self, shifts: Tensor, part: slice = slice(None)) -> Tensor:
        """`w @ metric @ w` of shifts `w`, `(..., part)`, that are zero outside of a part of the dimensions."""
        return (shifts @ self.factor[:, part].T).square().sum(dim=-1) + self.ridge * shifts.square().sum(dim=-1)

    def solve(self, vector: Tensor) -> Tensor:
        """The vector, `(d,)`, whose product is the given one."""
        inner = self.factor @ self.factor.T
        inner.diagonal().add_(self.ridge)
        return (vector - self.factor.T @ torch.linalg.solve(inner, self.factor @ vector)) / self.ridge


def select_features(
    gain: Tensor,
    metric: Metric,
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
        metric: The second derivative of the divergence with respect to the shift, `(d, d)`.
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
    energies = energies.clone()
    while len(chosen) < k:
        shift = weights @ decoder
        left = gain - metric.product(shift)
        scores = products(left) / energies.sqrt()
        best = int(scores.argmax())
        # Half its square is what the feature adds; what follows would depend on rounding.
        if scores[best] <= 0 or scores[best] ** 2 <= _NEGLIGIBLE * (gain @ shift):
            break
        energies[best] = torch.inf
        chosen = torch.cat([chosen, torch.tensor([best], device=chosen.device)])
        decoder = torch.cat([decoder, rows(chosen[-1:])])
        weights = _best_weights(gain, metric, decoder)
        chosen, decoder, weights = chosen[weights > 0], decoder[weights > 0], weights[weights > 0]
    return chosen, weights


def _best_weights(gain: Tensor, metric: Metric, decoder: Tensor) -> Tensor:
    """The weights of chosen rows that gain most; 0 for those that would be negative."""
    curvature, slope = decoder @ metric.product(decoder).T, decoder @ gain
    kept = torch.arange(len(decoder), device=gain.device)
    while len(kept):
        solved = torch.linalg.solve(curvature[kept][:, kept], slope[kept])
        if (solved > 0).all():
            return torch.zeros_like(slope).index_copy(0, kept, solved)
        kept = kept[solved > 0]
    return torch.zeros_like(slope)
