"""Selects the tokens of a forward pass to steer."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import UnsupportedOperationError
from .call import Call

Positions = Literal["all", "completion", "last"]
POSITIONS: tuple[str, ...] = get_args(Positions)


def tokens_to_steer(positions: str, hidden: Tensor, call: Call) -> Tensor | None:
    """Selects which of the current tokens an adapter steers.

    - "all": every token.
    - "completion": tokens of the completion. With labels, those whose label is not -100; in `generate`, those after
      the prompt; otherwise those passed once the cache is not empty (what is passed before is the prompt).
    - "last": every token from which the next one is predicted. With labels, those whose next label is not -100; in
      `generate`, the last one of the prompt and all after it; otherwise the last attended token of each row.

    Args:
        positions: One of `POSITIONS`.
        hidden: The current hidden states, `(batch, seq, d_model)`.
        call: The current call of the model.

    Returns:
        A boolean mask `(batch, seq)`, or None for all tokens.

    Raises:
        UnsupportedOperationError: Token positions are unknown, and there are no labels.
    """
    if positions == "all":
        return None
    batch, seq = hidden.shape[:2]
    if call.labels is not None:
        scored = call.labels.to(hidden.device) != -100
        if positions == "completion":
            return scored
        predicts = torch.zeros_like(scored)
        predicts[:, :-1] = scored[:, 1:]
        return predicts | scored
    if call.uncounted:
        raise UnsupportedOperationError(
            f"positions={positions!r} cannot tell prompts and answers apart where several sequences are packed into a "
            "row (generate_batch) or the model keeps a state instead of a cache (Mamba, RWKV): use an adapter of "
            "positions='all', or generate with use_cache=False."
        )
    index = call.past_length + torch.arange(seq, device=hidden.device)
    if call.prompt_length is not None:
        after_prompt = (index >= call.prompt_length).expand(batch, seq)
        end = call.prompt_length
    else:
        past_length = int(call.past_length)
        after_prompt = torch.full((batch, seq), positions == "completion" and past_length > 0, device=hidden.device)
        end = past_length + seq
    if positions == "completion":
        return after_prompt
    return after_prompt | (index == _last_attended(call.attention_mask, end, hidden.device))


def _last_attended(attention_mask: Tensor | None, end: int, device: torch.device) -> Tensor:
    """Index of the last attended token among the first `end` of each row, `(batch, 1)`, or of all rows, `(1,)`."""
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2 or attention_mask.shape[1] < end:
        return torch.tensor([end - 1], device=device)
    attended = attention_mask[:, :end].to(device) != 0
    return (attended * torch.arange(end, device=device)).argmax(dim=1, keepdim=True)
