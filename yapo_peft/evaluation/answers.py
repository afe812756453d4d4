"""Log-probabilities of answers in rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..tuner.adapters import steered_layers


def share_above_zero(margin: Tensor) -> Tensor:
    """1 where a margin is positive, 0 where it is not, NaN where the model overflowed."""
    return (margin > 0).float().masked_fill(~margin.isfinite(), torch.nan)


def answer_logps(model: Any, input_ids: Tensor, attention_mask: Tensor, answer_mask: Tensor) -> Tensor:
    """Log-probability of each row's answer, `(batch,)`, in nats, summed over its tokens in float32.

    Args:
        model: A causal language model, or what calls one.
        input_ids: `(batch, seq)`, padded on either side.
        attention_mask: `(batch, seq)`.
        answer_mask: 1 on the tokens of the answer, `(batch, seq)`.
    """
    found = [
        logps.gather(-1, ids[mask.bool()][:, None]).sum()
        for logps, ids, mask in zip(
            log_probs_of_answers(model, input_ids, attention_mask, answer_mask), input_ids, answer_mask, strict=True
        )
    ]
    return torch.stack(found)


def log_probs_of_answers(
    model: Any, input_ids: Tensor, attention_mask: Tensor, answer_mask: Tensor
) -> Iterator[Tensor]:
    """Of each row, log-probabilities of the whole vocabulary at each token of its answer, `(tokens, vocabulary)`.

    Arguments are those of `answer_logps`.
    """
    predicts = answer_mask[:, 1:].bool()
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if needs_labels(model):
        first = 0
        inputs["labels"] = input_ids.masked_fill(answer_mask == 0, -100)
    else:
        # Nothing before the first answer is scored, so the LM head need not run there.
        first = int(predicts.any(dim=0).int().argmax())
        inputs["logits_to_keep"] = input_ids.shape[1] - first
    logits = model(**inputs).logits[:, :-1]
    for row, positions in zip(logits, predicts, strict=True):
        yield row[positions[first:]].float().log_softmax(-1)


def needs_labels(model: Any) -> bool:
    """Whether an adapter must be told which tokens are the answer."""
    module: nn.Module = model if isinstance(model, nn.Module) else model.model
    return any(layer.positions[name] != "all" for layer in steered_layers(module) for name in layer.steering_adapters)
