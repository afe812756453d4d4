"""Sparse regression of a vector on decoder rows."""

from __future__ import annotations

import torch
from torch import Tensor


def sparse_regression(vector: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor, float]:
    """Approximates a vector by a sum of few rows of a matrix, by orthogonal matching pursuit.

    Each step adds the row with the largest absolute cosine similarity to the residual, and refits the weights of all
    chosen rows by least squares.

    Args:
        vector: The vector, `(d,)` in float32.
        rows: The matrix, `(n, d)` in float32.
        count: Maximum number of rows.

    Returns:
        The rows' indices, their weights, the largest absolute ones first, and the share of the vector's squared norm
        that they explain.

    Source: Pati, Rezaiifar and Krishnaprasad, 1993.
    """
    norms = rows.norm(dim=1)
    residual, chosen = vector, torch.zeros(0, dtype=torch.long, device=rows.device)
    weights = torch.zeros(0, device=rows.device)
    for _ in range(min(count, len(rows), len(vector))):
        similarity = (rows @ residual).abs() / norms.clamp(min=1e-12)
        similarity[chosen] = 0
        best = similarity.argmax()
        if similarity[best] <= 1e-6 * vector.norm():
            break
        chosen = torch.cat([chosen, best[None]])
        weights = torch.linalg.lstsq(rows[chosen].T, vector[:, None]).solution.squeeze(-1)
        residual = vector - weights @ rows[chosen]
    order = weights.abs().argsort(descending=True)
    explained = 1 - float(residual.square().sum() / vector.square().sum()) if vector.any() else 0.0
    return chosen[order], weights[order], explained
