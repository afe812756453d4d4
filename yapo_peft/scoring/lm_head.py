"""Scores answers with the language-model head on their tokens alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .packing import head_on


def score_answers(
    model: Any, call: Callable[..., Any], inputs: dict[str, Any], predictors: Tensor, targets: Tensor, scored: Tensor
) -> Any:
    """Runs a model that TRL gave a fused head, which elsewhere than on GPUs would score every position.

    Args:
        model: The causal language model, without what wraps it.
        call: The model as it is called in training.
        inputs: What it is called with.
        predictors: Where, in its flattened tokens, those of answers are predicted, `(scored,)`.
        targets: These tokens, `(scored,)`.
        scored: Where they go in the result, a mask of `scored` entries.

    Returns:
        TRL's output of a fused head, each field shaped as the mask and 0 where it is false.
    """
    with head_on(model, predictors):
        result = call(**inputs, shift_labels=targets[None], fused_lm_head=True)
    for name, value in list(result.items()):
        if isinstance(value, Tensor) and value.shape == (1, len(targets)):
            mask = scored.to(value.device)
            result[name] = value.new_zeros(mask.shape).masked_scatter(mask, value)
    return result


def score_rows(model: Any, call: Callable[..., Any], inputs: dict[str, Any]) -> Any:
    """As `score_answers`, for a batch with labels, `(batch, seq)`: the result is `(batch, seq - 1)`."""
    labels = inputs["labels"]
    scored = labels[:, 1:] != -100
    if not scored.any():
        return call(**inputs, fused_lm_head=True)
    index = torch.arange(labels.numel(), device=labels.device).view_as(labels)
    return score_answers(model, call, inputs, index[:, :-1][scored], labels[:, 1:][scored], scored)
