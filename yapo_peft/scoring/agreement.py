"""Whether another way to compute log-probabilities gives the same, which decides what a run may spare itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .packing import PackedBatch, share_prompts

# Up to which distance log-probabilities count as the same, in nats: of an answer's tokens in the mean, of a whole
# vocabulary everywhere.
SAME, SAME_IN_16_BITS = 1e-3, 5e-2
# Tokens whose log-probabilities over the vocabulary are held at once.
TOKENS_AT_ONCE = 64


def distance(log_probs: Tensor, expected: Tensor) -> float:
    """The mean over answers' tokens of how far log-probabilities are apart, in nats."""
    scored = expected != 0
    return float((log_probs - expected)[scored].abs().mean())


def same(log_probs: Tensor, expected: Tensor, is_exact: bool) -> bool:
    """Whether log-probabilities are equal but for rounding, to 16 bits unless all is exact."""
    return distance(log_probs, expected) <= (SAME if is_exact else SAME_IN_16_BITS)


def window_of(base: Any) -> float:
    """How far the attention of a causal language model looks back, in tokens; infinity if nothing limits it."""
    text = base.config.get_text_config()
    windows = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size")]
    return min((window for window in windows if window), default=float("inf"))


def why_not_shared(
    base: Any,
    score: Callable[[PackedBatch], Tensor],
    sample: dict[str, Tensor],
    expected: Tensor,
    longest: int,
    is_exact: bool,
) -> str | None:
    """Why answers cannot follow the same prompt in a row, or None if they can.

    Args:
        base: The causal language model.
        score: Log-probabilities of the answers' tokens of a batch, `(2 * pairs, seq - 1)`, 0 elsewhere.
        sample: A collated batch of pairs.
        expected: What `score` gives for it in rows as they are.
        longest: The most tokens that a prompt and an answer have.
        is_exact: Whether nothing is rounded to 16 bits.
    """
    attention = base.config._attn_implementation
    if attention not in ("eager", "sdpa"):
        return f"{attention} attention takes no mask of single tokens"
    if longest > window_of(base):
        return "sequences are longer than the attention's window"
    # All in one row, and once more with other tokens in the chosen answers, which nothing else may see.
    together = share_prompts(sample, attention_cost=0.0)
    other = (together.input_ids + 1) % base.get_input_embeddings().num_embeddings
    changed = replace(together, input_ids=torch.where(together.is_chosen, other, together.input_ids))
    try:
        shared, leaked = score(together), score(changed)
    except Exception as error:  # whatever a model says that takes no such mask or positions
        return f"the model takes no mask of single tokens ({type(error).__name__}: {error})"
    leak = (shared - leaked).chunk(2)[1].abs().max()
    if leak > 1e-5 or not same(shared, expected, is_exact):
        return f"answers would see each other, or their prompt elsewhere (by up to {float(leak):.2g} nats)"
    return None
