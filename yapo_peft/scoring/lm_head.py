"""Log-probabilities of answers, with the language-model head run only where it is needed."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..tuner.adapters import steered_layers
from ..tuner.hooks import forward_hooks
from .checks import TOKENS_AT_ONCE
from .packing import PackedBatch


@contextmanager
def head_on(model: Any, predictors: Tensor) -> Generator[None]:
    """Runs a causal language model's head on some tokens only, as one row.

    Args:
        model: The causal language model.
        predictors: The tokens' indices in the flattened batch, `(n,)`.
    """

    def keep(output: Any) -> Any:
        states = output["last_hidden_state"]
        output["last_hidden_state"] = states.flatten(0, 1)[predictors.to(states.device)][None]
        return output

    with forward_hooks([(model.base_model, keep)]):
        yield


def score_answers(
    model: Any, call: Callable[..., Any], inputs: dict[str, Any], predictors: Tensor, targets: Tensor, scored: Tensor
) -> Any:
    """Calls a model with TRL's fused head, which off GPUs would otherwise score every position.

    Args:
        model: The causal language model, unwrapped.
        call: The model as it is called in training.
        inputs: Its inputs.
        predictors: Indices, in the flattened batch, of the tokens that predict answers' tokens, `(scored,)`.
        targets: The answers' tokens, `(scored,)`.
        scored: A mask with `scored` true entries, where the results are placed.

    Returns:
        The output of TRL's fused head; per-token fields have the shape of the mask, and are 0 where it is false.
    """
    with head_on(model, predictors):
        result = call(**inputs, shift_labels=targets[None], fused_lm_head=True)
    for name, value in list(result.items()):
        if isinstance(value, Tensor) and value.shape == (1, len(targets)):
            mask = scored.to(value.device)
            result[name] = value.new_zeros(mask.shape).masked_scatter(mask, value)
    return result


def score_rows(model: Any, call: Callable[..., Any], inputs: dict[str, Any]) -> Any:
    """As `score_answers`, for a batch with labels, `(batch, seq)`; per-token fields are `(batch, seq - 1)`."""
    labels = inputs["labels"]
    scored = labels[:, 1:] != -100
    if not scored.any():
        return call(**inputs, fused_lm_head=True)
    index = torch.arange(labels.numel(), device=labels.device).view_as(labels)
    return score_answers(model, call, inputs, index[:, :-1][scored], labels[:, 1:][scored], scored)


def score_packed(model: Any, call: Callable[..., Any], batch: PackedBatch) -> Any:
    """As `score_answers`, for packed pairs; per-token fields are `(2 * pairs, seq - 1)`."""
    return score_answers(model, call, batch.inputs(model.dtype), batch.predictors, batch.targets, batch.scored)


def packed_log_probs(model: Any, base: Any, batch: PackedBatch) -> Tensor:
    """Log-probabilities of answers' tokens, `(2 * pairs, seq - 1)`, in nats, in float32; 0 elsewhere.

    Args:
        model: The model, or a callable that calls it.
        base: The causal language model in it.
        batch: The pairs.
    """
    inputs = {name: value for name, value in batch.inputs(base.dtype).items() if name != "labels"}
    with head_on(base, batch.predictors):
        logits = model(**inputs, use_cache=False).logits[0]
    found = [
        part.float().log_softmax(-1).gather(-1, targets[:, None].to(part.device)).squeeze(-1)
        for part, targets in zip(logits.split(TOKENS_AT_ONCE), batch.targets.split(TOKENS_AT_ONCE), strict=True)
    ]
    scored = batch.scored.to(logits.device)
    return torch.zeros(scored.shape, device=logits.device).masked_scatter(scored, torch.cat(found))


def answer_logps(model: Any, input_ids: Tensor, attention_mask: Tensor, answer_mask: Tensor) -> Tensor:
    """Log-probability of each row's answer, `(batch,)`, in nats, summed over its tokens in float32.

    Args:
        model: A causal language model, or a callable that calls one.
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
    """Yields, for each row, log-probabilities over the vocabulary at each token of its answer, `(tokens, vocabulary)`.

    Arguments are those of `answer_logps`.
    """
    predicts = answer_mask[:, 1:].bool()
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if needs_labels(model):
        first = 0
        inputs["labels"] = input_ids.masked_fill(answer_mask == 0, -100)
    else:
        # Nothing before the first answer is scored, so the head need not run there.
        first = int(predicts.any(dim=0).int().argmax())
        inputs["logits_to_keep"] = input_ids.shape[1] - first
    logits = model(**inputs).logits[:, :-1]
    for row, positions in zip(logits, predicts, strict=True):
        yield row[positions[first:]].float().log_softmax(-1)


def needs_labels(model: Any) -> bool:
    """Whether an active adapter needs labels to tell which tokens are the answer's."""
    module: nn.Module = model if isinstance(model, nn.Module) else model.model
    return any(layer.positions[name] != "all" for layer in steered_layers(module) for name in layer.steering_adapters)
