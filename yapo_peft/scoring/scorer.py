"""How a batch's answers are scored: by the whole model, or by its upper half on cached activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..steering.learning import ActiveFeatures
from ..tuner.call import Call
from .lm_head import score_answers, score_rows
from .packing import PackedBatch
from .upper_half import UpperHalf


@dataclass(frozen=True)
class WholeModel:
    """Scores by calling the model.

    Attributes:
        model: The model as it is called in training.
        base: The causal language model in it.
    """

    model: Callable[..., Any]
    base: nn.Module

    def __call__(self, **kwargs: Any) -> Any:
        """Scores a batch as TRL's fused head does, but the answers' tokens alone."""
        del kwargs["fused_lm_head"]
        return score_rows(self.base, self.model, kwargs)

    @property
    def reference(self) -> Callable[..., Any]:
        """What scores the answers without steering, when steering is off."""
        return self

    def multiplier_of_rows(self, directions: Tensor) -> Tensor:
        """The multiplier of each row that the model sees, `(rows,)`, from the direction of each pair, `(pairs,)`."""
        return torch.cat([directions, directions])

    def collated(self, tokens: Tensor) -> Tensor:
        """Something of each token that the model sees, as of each token of the collated batch, `(2 * pairs, seq)`."""
        return tokens


@dataclass(frozen=True)
class CachedPairs:
    """Scores by the blocks above the lowest steered one, with the same meaning.

    Attributes:
        model: The model as it is called in training.
        upper: Its upper half.
        call: The call that its steered layers see.
        batch: The pairs, packed.
        hidden: Output of the lowest steered block, `(rows, length, d_model)`.
        features: The features that are on there.
        unsteered: Log-probabilities without steering, `(2 * pairs, seq - 1)`, in nats.
    """

    model: Callable[..., Any]
    upper: UpperHalf
    call: Call
    batch: PackedBatch
    hidden: Tensor
    features: ActiveFeatures
    unsteered: Tensor

    def __call__(self, **kwargs: Any) -> Any:
        """Scores the batch; what it is called with is known already."""
        with self.upper.given(self.hidden), self.call.knowing(self.features):
            return score_packed(self.upper.model, self.model, self.batch)

    @property
    def reference(self) -> Callable[..., Any]:
        """What scores the answers without steering."""
        return lambda **kwargs: SimpleNamespace(log_probs=self.unsteered)

    def multiplier_of_rows(self, directions: Tensor) -> Tensor:
        """As `WholeModel.multiplier_of_rows`."""
        return self.batch.multiplier_of_rows(directions)

    def collated(self, tokens: Tensor) -> Tensor:
        """As `WholeModel.collated`."""
        return tokens.flatten()[self.batch.origin.to(tokens.device)]


Scorer = WholeModel | CachedPairs


def score_packed(model: nn.Module, call: Callable[..., Any], batch: PackedBatch) -> Any:
    """Scores the answers of packed pairs, `(2 * pairs, seq - 1)`, by the model as it is called in training."""
    inputs = batch.inputs(cast(Any, model).dtype)
    return score_answers(model, call, inputs, batch.predictors, batch.targets, batch.scored)
