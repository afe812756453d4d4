"""The vector of a code."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..sae import FrozenSAE


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
