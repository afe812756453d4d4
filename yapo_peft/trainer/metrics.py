"""Metrics of the codes that are trained."""

from __future__ import annotations

import torch
from torch import Tensor

from .._utils import whole
from ..tuner import YaPOLayer


def size_of_codes(layers: list[YaPOLayer]) -> dict[str, float]:
    """Number of non-zero entries and norm of the steering codes of all layers; empty if none steers."""
    codes = [whole(layer.yapo_code[name]).cpu() for layer in layers for name in layer.steering_adapters]
    if not codes:
        return {}
    joined = torch.cat(codes)
    return {"code/nonzero": float(joined.count_nonzero()), "code/norm": float(joined.norm())}


def share_of_tokens_moved(moved: list[Tensor], attention_mask: Tensor) -> Tensor:
    """Share of the attended tokens with a feature that moved, the mean over layers, `(1,)`; empty if none steers.

    Args:
        moved: For each layer, whether a feature of a token moved, `(batch, seq)`.
        attention_mask: `(batch, seq)`.
    """
    attended = attention_mask.bool()
    shares = [(tokens.to(attended.device) & attended).sum() / attended.sum() for tokens in moved]
    return torch.stack(shares).mean()[None] if shares else torch.zeros(0, device=attended.device)
