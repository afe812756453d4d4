"""What must hold for a run to skip work: to share prompts between answers, or to run only a model's upper half."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..errors import ConfigError, UnsupportedOperationError
from ..tuner.blocks import is_code
from .packing import PackedBatch, share_prompts

# Log-probabilities count as equal up to this distance, in nats: the mean over answers' tokens, or the maximum over a
# vocabulary.
SAME, SAME_IN_16_BITS = 1e-3, 1e-1
# What is raised when layers need states of skipped ones, which fail in different ways.
LAYER_ERRORS = (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError)
# Tokens whose log-probabilities over the vocabulary are held at once.
TOKENS_AT_ONCE = 64


def distance(log_probs: Tensor, expected: Tensor) -> float:
    """Mean distance of log-probabilities over answers' tokens, in nats."""
    scored = expected != 0
    return float((log_probs - expected)[scored].abs().mean())


def same(log_probs: Tensor, expected: Tensor, is_exact: bool) -> bool:
    """Whether log-probabilities of answers' tokens are equal up to rounding; to 16 bits unless `is_exact`."""
    return distance(log_probs, expected) <= (SAME if is_exact else SAME_IN_16_BITS)


def same_logits(logits: Tensor, expected: Tensor) -> bool:
    """Whether logits give the same log-probabilities over the vocabulary, up to rounding of their dtype."""
    bound = SAME if logits.dtype == torch.float32 else SAME_IN_16_BITS
    parts = (part.flatten(0, -2).split(TOKENS_AT_ONCE) for part in (logits, expected))
    return logits.shape == expected.shape and all(
        torch.allclose(one.float().log_softmax(-1), other.float().log_softmax(-1), rtol=0, atol=bound, equal_nan=True)
        for one, other in zip(*parts, strict=True)
    )


def attention_window(base: Any) -> float:
    """How many tokens a causal language model's attention looks back; infinity if its config sets no limit."""
    text = base.config.get_text_config()
    windows = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size")]
    return min((window for window in windows if window), default=float("inf"))


def context_length(base: Any) -> int | None:
    """The maximum number of tokens of a causal language model's input; None if its config has none."""
    return getattr(base.config.get_text_config(), "max_position_embeddings", None)


def require_length(base: Any, tokens: int, what: str) -> None:
    """Raises `ConfigError` if a causal language model's context is too short."""
    longest = context_length(base)
    if longest is not None and tokens > longest:
        raise ConfigError(f"{what} has {tokens} tokens, but the model takes at most {longest}: shorten it.")


def require_room(base: Any, tokens: int, max_new_tokens: int) -> None:
    """Raises `ConfigError` if a prompt of that many tokens and its answer do not fit the model's context."""
    what = f"The prompt of {tokens} tokens with max_new_tokens={max_new_tokens}"
    require_length(base, tokens + max_new_tokens, what)


def longest(batches: Iterable[dict[str, Tensor]]) -> int:
    """The length of the longest row of batches, in tokens."""
    return max((batch["input_ids"].shape[1] for batch in batches), default=0)


def why_not_shared(
    base: Any,
    score: Callable[[PackedBatch], Tensor],
    sample: dict[str, Tensor],
    expected: Tensor,
    longest: int,
    is_exact: bool,
) -> str | None:
    """Returns why the two answers of a pair cannot follow one copy of their prompt, or None if they can.

    Args:
        base: The causal language model.
        score: Computes the log-probabilities of answers' tokens, `(2 * pairs, seq - 1)`, 0 elsewhere.
        sample: A collated batch of pairs.
        expected: The result of `score` for the batch as it is.
        longest: The length of the longest prompt with an answer, in tokens.
        is_exact: Whether nothing is rounded to 16 bits.
    """
    attention = base.config._attn_implementation  # pyright: ignore[reportPrivateUsage]
    if attention not in ("eager", "sdpa"):
        return f"{attention} attention does not support a mask per pair of tokens"
    if longest > attention_window(base):
        return "sequences are longer than the attention's window"
    # All pairs in one row; then again with other tokens in the chosen answers, which must not affect the others.
    together = share_prompts(sample, attention_cost=0.0)
    other = (together.input_ids + 1) % base.get_input_embeddings().num_embeddings
    changed = replace(together, input_ids=torch.where(together.is_chosen, other, together.input_ids))
    try:
        shared, leaked = score(together), score(changed)
    except Exception as error:  # models without support for such masks or positions fail in different ways
        return f"the model does not support a mask per pair of tokens ({type(error).__name__}: {error})"
    leak = (shared - leaked).chunk(2)[1].abs().max()
    if leak > 1e-5 or not same(shared, expected, is_exact):
        return f"answers would attend to each other, or their prompt would differ (by up to {float(leak):.2g} nats)"
    return None


def require_constant(model: PeftModel) -> None:
    """Checks that everything below the codes computes the same in every step.

    Raises:
        UnsupportedOperationError: Other parameters are trained, or there is dropout.
    """
    others = [n for n, p in model.named_parameters() if p.requires_grad and not is_code(n)]
    if others:
        raise UnsupportedOperationError(
            f"cache_activations=True needs a frozen model below the lowest steered layer, but {others[0]!r} is "
            "trained as well: freeze it, or train without the cache."
        )
    dropout = [name for name, module in model.named_modules() if isinstance(module, nn.Dropout) and module.p > 0]
    if dropout:
        raise UnsupportedOperationError(
            f"cache_activations=True needs the same activations in every epoch, but {dropout[0]!r} applies dropout: "
            "leave disable_dropout=True, or train without the cache."
        )


def require_no_noise(
    model: PeftModel,
    score: Callable[[PackedBatch], Tensor],
    sample: PackedBatch,
    expected: Tensor,
    training_mode: AbstractContextManager[Any],
) -> None:
    """Checks that the model gives the same log-probabilities in training mode.

    Args:
        model: The model as it is called, in evaluation mode.
        score: Computes the log-probabilities of answers' tokens.
        sample: Some pairs.
        expected: The result of `score` for them in evaluation mode.
        training_mode: Entered around the forward pass, to turn gradient checkpointing off.

    Raises:
        UnsupportedOperationError: They differ.
    """
    model.train()
    with training_mode:
        trained = score(sample)
    model.eval()
    if not torch.allclose(trained, expected, rtol=1e-4, atol=1e-4):
        raise UnsupportedOperationError(
            f"cache_activations=True needs the same activations in every epoch, but "
            f"{type(model.get_base_model()).__name__} adds noise in training mode (dropout, layer drop or router "
            "jitter): set it to 0 in the model's config, or train without the cache."
        )
