"""Log-probabilities of answers, with the language-model head run only where it is needed."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ..tuner.adapters import steered_layers
from ..tuner.hooks import forward_hooks
from ..tuner.positions import labels_for
from .checks import LAYER_ERRORS, TOKENS_AT_ONCE, same
from .packing import PackedBatch


@contextmanager
def head_on(model: Any, predictors: Tensor) -> Generator[list[bool]]:
    """Runs a causal language model's head on some tokens only, as one row, if it calls its body as a module.

    Args:
        model: The causal language model.
        predictors: The tokens' indices in the flattened batch, `(n,)`.

    Yields:
        A list that has an entry once the head runs on them only.
    """
    reduced: list[bool] = []

    def keep(output: Any) -> Any:
        # Llama 4 and others are their own base model, and return logits.
        if "last_hidden_state" not in output:
            return None
        states = output["last_hidden_state"]
        output["last_hidden_state"] = states.flatten(0, 1)[predictors.to(states.device)][None]
        reduced.append(True)
        return output

    with forward_hooks([(model.base_model, keep)]):
        yield reduced


def logits_at(model: Any, call: Callable[..., Any], inputs: dict[str, Any], predictors: Tensor) -> Any:
    """Calls a model, and replaces its output's logits by those of some tokens, `(n, vocabulary)`.

    Args:
        model: The causal language model, unwrapped.
        call: The model as it is called.
        inputs: Its inputs; with labels, of which the model makes a loss, its head runs on all tokens.
        predictors: The tokens' indices in the flattened batch, `(n,)`.
    """
    with head_on(model, predictors) if "labels" not in inputs else nullcontext() as reduced:
        output = call(**{**inputs, "use_cache": False})
    logits = output.logits
    output.logits = logits[0] if reduced else logits.flatten(0, 1)[predictors.to(logits.device)]
    return output


@dataclass(frozen=True)
class AnswerHead:
    """Scores answers' tokens as TRL does, with the head run on these only.

    Attributes:
        model: The causal language model, with TRL's fused head.
        is_fused: Whether that head gives the log-probabilities of the model; otherwise its own runs, on whole logits.
    """

    model: Any
    is_fused: bool = True

    @classmethod
    def of(cls, model: Any, call: Callable[..., Any], inputs: dict[str, Any]) -> AnswerHead:
        """Compares both heads on a batch with labels, `(batch, seq)`: TRL's does not know how all models cap logits."""
        own = cls(model, is_fused=False).rows(call, inputs).log_probs
        try:
            fused = cls(model).rows(call, inputs).log_probs
        except torch.OutOfMemoryError:
            raise
        except LAYER_ERRORS:
            return cls(model, is_fused=False)
        return cls(model, same(fused, own, own.dtype == torch.float32 and model.dtype == torch.float32))

    def rows(self, call: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        """Scores a batch with labels, `(batch, seq)`; per-token fields of the output are `(batch, seq - 1)`."""
        labels = inputs["labels"]
        scored = labels[:, 1:] != -100
        if not scored.any():
            return call(**inputs, fused_lm_head=True)
        index = torch.arange(labels.numel(), device=labels.device).view_as(labels)
        return self._score(call, inputs, index[:, :-1][scored], labels[:, 1:][scored], scored)

    def packed(self, call: Callable[..., Any], batch: PackedBatch) -> Any:
        """Scores packed pairs; per-token fields of the output are `(2 * pairs, seq - 1)`."""
        return self._score(call, batch.inputs(self.model.dtype), batch.predictors, batch.targets, batch.scored)

    def _score(
        self, call: Callable[..., Any], inputs: dict[str, Any], predictors: Tensor, targets: Tensor, scored: Tensor
    ) -> Any:
        """Scores tokens, `(scored,)`, and places the results where a mask is true; they are 0 elsewhere."""
        if self.is_fused:
            with head_on(self.model, predictors):
                result = call(**inputs, shift_labels=targets[None], fused_lm_head=True)
        else:
            result = self._own(call, inputs, predictors, targets)
        for name, value in list(result.items()):
            if isinstance(value, Tensor) and value.shape == (1, len(targets)):
                mask = scored.to(value.device)
                result[name] = value.new_zeros(mask.shape).masked_scatter(mask, value)
        return result

    def _own(self, call: Callable[..., Any], inputs: dict[str, Any], predictors: Tensor, targets: Tensor) -> Any:
        """The fields of TRL's fused head, `(1, scored)`, from logits."""
        if not needs_labels(self.model):
            inputs = {name: value for name, value in inputs.items() if name != "labels"}
        output = logits_at(self.model, call, inputs, predictors)
        logits = output.logits.float()
        log_probs = logits.log_softmax(-1)
        targets = targets.to(logits.device)
        probs = log_probs.exp()
        fields = {
            "log_probs": log_probs.gather(-1, targets[:, None]).squeeze(-1),
            "entropy": -(probs * log_probs).sum(-1),
            "mean_logits": logits.detach().mean(-1),
            "log_sum_sq_probs": (2 * log_probs.detach()).logsumexp(-1),
            "is_top1": logits.argmax(-1) == targets,
        }
        found = ModelOutput({name: value[None] for name, value in fields.items()})
        if getattr(output, "aux_loss", None) is not None:
            found["aux_loss"] = output.aux_loss
        return found


def packed_log_probs(model: Any, base: Any, batch: PackedBatch) -> Tensor:
    """Log-probabilities of answers' tokens, `(2 * pairs, seq - 1)`, in nats, in float32; 0 elsewhere.

    Args:
        model: The model, or a callable that calls it.
        base: The causal language model in it.
        batch: The pairs.
    """
    inputs = {name: value for name, value in batch.inputs(base.dtype).items() if name != "labels"}
    logits = logits_at(base, model, inputs, batch.predictors).logits
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
    return bool(_positions_of(model) - {"all"})


def text_labels(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
    """The labels that active adapters need on text without prompts, if they do, as arguments of the model."""
    found = _positions_of(model) - {"all"}
    return {"labels": labels_for(found, input_ids, attention_mask)} if found else {}


def _positions_of(model: Any) -> set[str]:
    module: nn.Module = model if isinstance(model, nn.Module) else model.model
    # Also those at multiplier 0, in whose place the start of training steers.
    return {layer.positions[name] for layer in steered_layers(module) for name in layer.enabled_adapters}
