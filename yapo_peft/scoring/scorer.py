"""Scores the answers of a batch: with the whole model, or with the layers above the lowest steered one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..steering.learning import ActiveFeatures
from ..tuner.adapters import steered_layers
from ..tuner.blocks import base_of, decoder_blocks
from ..tuner.call import Call
from ..tuner.dial import dialled
from ..tuner.layer import lowest_steered
from .checks import LAYER_ERRORS, attention_window, same_logits, why_not_shared
from .lm_head import AnswerHead, answer_logps, needs_labels, packed_log_probs
from .packing import PackedBatch, attention_cost, keep_rows, share_prompts
from .upper_half import UpperHalf


@dataclass(frozen=True)
class WholeModel:
    """Scores a training batch with the whole model.

    Attributes:
        model: The model as it is called in training.
        head: Its head.
    """

    model: Callable[..., Any]
    head: AnswerHead

    def __call__(self, **kwargs: Any) -> Any:
        """Scores a batch as TRL's fused head does, but only at the answers' tokens."""
        del kwargs["fused_lm_head"]
        return self.head.rows(self.model, kwargs)

    @property
    def reference(self) -> Callable[..., Any]:
        """Scores the answers without steering, while steering is off."""
        return self

    def multiplier_of_rows(self, directions: Tensor) -> Tensor:
        """The multiplier of each row of the forward pass, `(rows,)`, from each pair's direction, `(pairs,)`."""
        return torch.cat([directions, directions])

    def collated(self, tokens: Tensor) -> Tensor:
        """Maps values of the forward pass's tokens to those of the collated batch, `(2 * pairs, seq)`."""
        return tokens


@dataclass(frozen=True)
class CachedPairs:
    """Scores a training batch with the layers above the lowest steered one, on cached activations.

    Attributes:
        model: The model as it is called in training.
        head: Its head.
        upper: Its upper half.
        call: The call that its steered layers share.
        batch: The pairs, packed.
        hidden: Output of the lowest steered layer, `(rows, length, d_model)`.
        features: The active features there.
        unsteered: Log-probabilities without steering, `(2 * pairs, seq - 1)`, in nats.
    """

    model: Callable[..., Any]
    head: AnswerHead
    upper: UpperHalf
    call: Call
    batch: PackedBatch
    hidden: Tensor
    features: ActiveFeatures
    unsteered: Tensor

    def __call__(self, **kwargs: Any) -> Any:
        """Scores the batch; the arguments are those of `WholeModel`, and are known already."""
        with self.upper.given(self.hidden), self.call.knowing(self.features):
            return self.head.packed(self.model, self.batch)

    @property
    def reference(self) -> Callable[..., Any]:
        """Returns the cached scores of the answers without steering."""
        return lambda **kwargs: SimpleNamespace(log_probs=self.unsteered)

    def multiplier_of_rows(self, directions: Tensor) -> Tensor:
        """As `WholeModel.multiplier_of_rows`."""
        return torch.stack([directions[pairs[0]] for pairs in self.batch.pairs_of_rows])

    def collated(self, tokens: Tensor) -> Tensor:
        """As `WholeModel.collated`."""
        return tokens.flatten()[self.batch.origin.to(tokens.device)]


Scorer = WholeModel | CachedPairs


class SweepScorer:
    """Calls a model on the same batches at several multipliers, and computes once what these have in common.

    Nothing below the output of the lowest steered layer depends on the multiplier, and both answers of a pair follow
    the same prompt. Both are compared with the whole model on rows as they are before they are used, and left out if
    log-probabilities differ.

    Args:
        model: A model with a YaPO adapter.
        calls: How often each batch is scored; with 1, the lower layers are not kept.
    """

    def __init__(self, model: nn.Module, calls: int) -> None:
        self.model = model
        self.base = base_of(model)
        lowest = lowest_steered(steered_layers(model))
        keeps = calls > 1 and lowest is not None and lowest.index > 0
        self._upper = UpperHalf(self.base, lowest.index) if keeps and lowest is not None else None
        self._is_checked = False
        self._inputs: dict[str, Any] = {}
        self._hidden: Tensor | None = None
        self._shares_prompts, self._longest_compared = not needs_labels(model), 0
        self._attention_cost = attention_cost(self.base, decoder_blocks(self.base)[1][-1])

    def __call__(self, **inputs: Any) -> Any:
        """Calls the model, or only its upper half for the inputs of the last call."""
        if self._upper is None:
            return self.model(**inputs)
        relevant = {name: value for name, value in inputs.items() if name not in ("labels", "logits_to_keep")}
        if not _equal(relevant, self._inputs):
            found: list[Tensor] = []
            with self._upper.observed(found):
                output = self.model(**inputs)
            self._inputs = {name: v.clone() if isinstance(v, Tensor) else v for name, v in relevant.items()}
            self._hidden = found[0]
            return output
        assert self._hidden is not None
        if self._is_checked:
            with self._upper.given(self._hidden):
                return self.model(**inputs)
        return self._compared(self._upper, self._hidden, inputs)

    def pair_logps(self, batch: dict[str, Tensor], kept: dict[str, Any]) -> Tensor:
        """Log-probability of each answer, `(2 * pairs,)`, in nats, summed over its tokens.

        Args:
            batch: A batch of `pair_batches`.
            kept: Holds the packed batch between calls for the same batch.
        """
        if "packed" not in kept:
            kept["packed"] = self._packed(batch)
        packed: PackedBatch | None = kept["packed"]
        if packed is not None:
            return packed_log_probs(self, self.base, packed).sum(dim=1)
        return answer_logps(self, batch["input_ids"], batch["attention_mask"], batch["answer_mask"])

    def _compared(self, upper: UpperHalf, hidden: Tensor, inputs: dict[str, Any]) -> Any:
        whole = self.model(**inputs)
        try:
            with upper.given(hidden):
                agree = same_logits(self.model(**inputs).logits, whole.logits)
        except torch.OutOfMemoryError:
            raise
        except LAYER_ERRORS:
            agree = False
        self._is_checked, self._upper = True, upper if agree else None
        return whole

    def _packed(self, batch: dict[str, Tensor]) -> PackedBatch | None:
        """The pairs of a batch with shared prompts; None if rows must stay as they are."""
        pairs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        pairs["completion_mask"] = batch["answer_mask"]
        longest = int(batch["attention_mask"].sum(dim=1).max())
        if not self._shares_prompts or longest > attention_window(self.base):
            return None
        if longest > self._longest_compared:
            # Longer pairs than before, because attention may look back only so far without saying so in the config.
            self._shares_prompts, self._longest_compared = self._can_share(pairs, longest), longest
        return share_prompts(pairs, self._attention_cost) if self._shares_prompts else None

    @torch.no_grad()
    def _can_share(self, pairs: dict[str, Tensor], longest: int) -> bool:
        lengths = torch.stack(pairs["attention_mask"].sum(dim=1).chunk(2)).amax(dim=0)
        two = lengths.argsort(descending=True)[:2]
        sample = {name: torch.cat([part[two] for part in rows.chunk(2)]) for name, rows in pairs.items()}

        def score(rows: PackedBatch) -> Tensor:
            return packed_log_probs(self.model, self.base, rows)

        is_exact = next(self.base.parameters()).dtype == torch.float32
        with dialled(self.model, 0.0):
            return why_not_shared(self.base, score, sample, score(keep_rows(sample)), longest, is_exact) is None


def _equal(inputs: dict[str, Any], others: dict[str, Any]) -> bool:
    return inputs.keys() == others.keys() and all(
        torch.equal(value, others[name]) if isinstance(value, Tensor) else value == others[name]
        for name, value in inputs.items()
    )
