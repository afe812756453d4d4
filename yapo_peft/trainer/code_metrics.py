"""What is logged of the codes themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tuner import YaPOLayer
from ..tuner.codes_on_disk import whole


def size_of_codes(layers: list[YaPOLayer]) -> dict[str, float]:
    """Non-zero entries and norm of the codes that steer, of all layers together; empty if none does."""
    codes = [whole(layer.yapo_code[name]).cpu() for layer in layers for name in layer.steering_adapters]
    if not codes:
        return {}
    everything = torch.cat(codes)
    return {"code/nonzero": float(everything.count_nonzero()), "code/norm": float(everything.norm())}


def share_of_tokens_moved(layers: list[YaPOLayer], attention_mask: Tensor) -> Tensor:
    """Share of the attended tokens with a feature that moved in the last forward pass, the mean over layers, `(1,)`.

    Empty, `(0,)`, if no layer steered.
    """
    attended = attention_mask.bool()
    shares = [
        (layer.moved_tokens.to(attended.device) & attended).sum() / attended.sum()
        for layer in layers
        if layer.moved_tokens is not None
    ]
    return torch.stack(shares).mean()[None] if shares else torch.zeros(0, device=attended.device)
