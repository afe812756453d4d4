"""What is logged of the codes themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from ..adapter_file.codes import whole
from ..tuner import YaPOLayer


def size_of_codes(layers: list[YaPOLayer]) -> dict[str, float]:
    """Non-zero entries and norm of the codes that steer, of all layers together; empty if none does."""
    codes = [whole(layer.yapo_code[name]).cpu() for layer in layers for name in layer.steering_adapters]
    if not codes:
        return {}
    everything = torch.cat(codes)
    return {"code/nonzero": float(everything.count_nonzero()), "code/norm": float(everything.norm())}


def share_of_tokens_moved(moved: list[Tensor], attention_mask: Tensor) -> Tensor:
    """Share of the attended tokens with a feature that moved, the mean over layers, `(1,)`; empty if none steered.

    Args:
        moved: For each layer, whether a feature of a token moved, `(batch, seq)`.
        attention_mask: `(batch, seq)`.
    """
    attended = attention_mask.bool()
    shares = [(tokens.to(attended.device) & attended).sum() / attended.sum() for tokens in moved]
    return torch.stack(shares).mean()[None] if shares else torch.zeros(0, device=attended.device)
