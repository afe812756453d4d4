"""A vector as a sum of few decoder rows."""

from __future__ import annotations

import torch
from torch import Tensor


def sparse_regression(vector: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor, float]:
    """Explains a vector by few rows of a matrix, by orthogonal matching pursuit.

    The row that is closest to what is left in direction comes next, and the weights of all chosen rows are fitted anew
    by least squares.

    Args:
        vector: `(d,)`, in float32.
        rows: `(n, d)`, in float32.
        count: How many rows to use at most.

    Returns:
        The rows' indices, those of the largest weight first, their weights, and the share of the vector's squared
        length that they explain.

    Source: Pati, Rezaiifar and Krishnaprasad, 1993.
    """
    lengths = rows.norm(dim=1)
    rest, chosen = vector, torch.zeros(0, dtype=torch.long, device=rows.device)
    weights = torch.zeros(0, device=rows.device)
    for _ in range(min(count, len(rows), len(vector))):
        alike = (rows @ rest).abs() / lengths.clamp(min=1e-12)
        alike[chosen] = 0
        best = alike.argmax()
        if alike[best] <= 1e-6 * vector.norm():
            break
        chosen = torch.cat([chosen, best[None]])
        weights = torch.linalg.lstsq(rows[chosen].T, vector[:, None]).solution.squeeze(-1)
        rest = vector - weights @ rows[chosen]
    order = weights.abs().argsort(descending=True)
    explained = 1 - float(rest.square().sum() / vector.square().sum()) if vector.any() else 0.0
    return chosen[order], weights[order], explained
