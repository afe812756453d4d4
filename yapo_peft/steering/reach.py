"""Selects the entries of codes that move activations the furthest."""

from __future__ import annotations

import torch
from torch import Tensor

from ..sae import FrozenSAE

# Rows of the decoder that are held at once.
_ROWS = 16384


def reach(code: Tensor, sae: FrozenSAE) -> Tensor:
    """Computes how far each entry of a code moves activations at multiplier 1 if no feature is cut.

    Args:
        code: The code, `(d_sae,)`.
        sae: Its autoencoder.

    Returns:
        `|v_i|` times the norm of the feature's decoder row, `(d_sae,)`.
    """
    found = torch.zeros_like(code)
    for part in code.nonzero().squeeze(-1).split(_ROWS):
        found[part] = code[part].abs() * sae.decoder_rows(part, code.device, code.dtype).norm(dim=1)
    return found


def keep_largest(codes: list[Tensor], saes: list[FrozenSAE], k: int) -> list[Tensor]:
    """Sets all but `k` entries of all codes together to zero: those that move activations the furthest remain.

    Args:
        codes: The codes of an adapter, `(d_sae,)` each.
        saes: The autoencoder of each.
        k: How many entries to keep.
    """
    reaches = torch.cat([reach(code, sae).cpu() for code, sae in zip(codes, saes, strict=True)])
    kept = torch.zeros_like(reaches, dtype=torch.bool)
    kept[reaches.topk(min(k, len(reaches))).indices] = True
    parts = kept.split([len(code) for code in codes])
    return [code.masked_fill(~part.to(code.device), 0) for code, part in zip(codes, parts, strict=True)]
