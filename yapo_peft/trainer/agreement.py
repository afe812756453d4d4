"""Whether another way to compute log-probabilities gives the same, which decides what a run may spare itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing

from ..errors import UnsupportedOperationError
from ..tuner.upper_half import SAME, SAME_IN_16_BITS
from .packing import PackedBatch, share_prompts
from .scoring import score_packed


def distance(log_probs: Tensor, expected: Tensor) -> float:
    """The mean over answers' tokens of how far log-probabilities are apart, in nats."""
    scored = expected != 0
    return float((log_probs - expected)[scored].abs().mean())


def same(log_probs: Tensor, expected: Tensor, is_exact: bool) -> bool:
    """Whether log-probabilities are equal but for rounding, to 16 bits unless all is exact."""
    return distance(log_probs, expected) <= (SAME if is_exact else SAME_IN_16_BITS)


def why_not_shared(
    model: PeftModel, base: Any, sample: dict[str, Tensor], expected: Tensor, longest: int, is_exact: bool
) -> str | None:
    """Why answers cannot follow the same prompt in a row, or None if they can.

    Args:
        model: The model as it is called.
        base: The causal language model in it.
        sample: A collated batch of pairs.
        expected: The log-probabilities of its answers, in rows as they are.
        longest: The most tokens that a prompt and an answer have.
        is_exact: Whether nothing is rounded to 16 bits.
    """
    text, attention = base.config.get_text_config(), base.config._attn_implementation
    windows = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    if attention not in ("eager", "sdpa"):
        return f"{attention} attention takes no mask of single tokens"
    if longest > min((window for window in windows if window), default=longest):
        return "sequences are longer than the attention's window"
    # All in one row, and once more with other tokens in the chosen answers, which nothing else may see.
    together = share_prompts(sample, attention_cost=0.0)
    other = (together.input_ids + 1) % base.get_input_embeddings().num_embeddings
    changed = replace(together, input_ids=torch.where(together.is_chosen, other, together.input_ids))
    try:
        shared, leaked = (score_packed(base, model, batch).log_probs for batch in (together, changed))
    except Exception as error:  # whatever a model says that takes no such mask or positions
        return f"the model takes no mask of single tokens ({type(error).__name__}: {error})"
    leak = (shared - leaked).chunk(2)[1].abs().max()
    if leak > 1e-5 or not same(shared, expected, is_exact):
        return f"answers would see each other, or their prompt elsewhere (by up to {float(leak):.2g} nats)"
    return None


def require_no_noise(model: PeftModel, base: Any, sample: PackedBatch, expected: Tensor, checkpointing: Any) -> None:
    """Raises if the model gives other log-probabilities in training mode.

    Args:
        model: The model as it is called, in evaluation mode.
        base: The causal language model in it.
        sample: Some pairs.
        expected: The log-probabilities of their answers.
        checkpointing: The run's `gradient_checkpointing_kwargs`.

    Raises:
        UnsupportedOperationError: They differ.
    """
    model.train()
    with disable_gradient_checkpointing(cast(Any, model), checkpointing):
        trained = score_packed(base, model, sample).log_probs
    model.eval()
    if not torch.allclose(trained, expected, rtol=1e-4, atol=1e-4):
        raise UnsupportedOperationError(
            f"cache_activations=True needs the same activations in every epoch, but {type(base).__name__} adds noise "
            "in training mode (dropout, layer drop or router jitter): set it to 0 in the model's config, or train "
            "without the cache."
        )
