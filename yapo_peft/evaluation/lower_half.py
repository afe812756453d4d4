"""Runs what lies below the lowest steered block once for several multipliers."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..scoring.agreement import SAME, SAME_IN_16_BITS, TOKENS_AT_ONCE
from ..scoring.upper_half import UpperHalf
from ..tuner.adapters import steered_layers
from ..tuner.layer import lowest_steered
from .answers import needs_labels
from .prompts_once import PromptsOnce


class LowerHalfOnce:
    """Calls a model, and remembers what its lowest steered block put out for the same inputs before.

    In the first call that it could spare something in, it runs the whole model as well and compares. A model whose
    upper blocks look past the steered one is called as a whole from then on.

    Args:
        model: A model with a YaPO adapter.
        calls: How often each batch will be scored; once, and there is nothing to spare.
    """

    def __init__(self, model: nn.Module, calls: int) -> None:
        self.model = model
        lowest = lowest_steered(steered_layers(model))
        self.base = cast(nn.Module, model.get_base_model() if hasattr(model, "get_base_model") else model)  # pyright: ignore
        self.prompts = None if needs_labels(model) else PromptsOnce(model, self.base)
        can_spare = calls > 1 and lowest is not None and lowest.index > 0
        self._upper = UpperHalf(self.base, lowest.index) if can_spare and lowest is not None else None
        self._inputs: dict[str, Any] = {}
        self._hidden: Tensor | None = None
        self._is_checked = False

    def __call__(self, **inputs: Any) -> Any:
        """Calls the model."""
        if self._upper is None:
            return self.model(**inputs)
        if not _equal(_of_blocks(inputs), self._inputs):
            found: list[Tensor] = []
            with self._upper.observed(found):
                output = self.model(**inputs)
            self._inputs = {name: v.clone() if isinstance(v, Tensor) else v for name, v in _of_blocks(inputs).items()}
            self._hidden = found[0]
            return output
        assert self._hidden is not None
        if self._is_checked:
            with self._upper.given(self._hidden):
                return self.model(**inputs)
        return self._compared(self._upper, self._hidden, inputs)

    def _compared(self, upper: UpperHalf, hidden: Tensor, inputs: dict[str, Any]) -> Any:
        whole = self.model(**inputs)
        try:
            with upper.given(hidden):
                part = self.model(**inputs)
            agree = _agree(whole.logits, part.logits)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError):
            # Blocks that others ask for what they kept fail in ways of their own.
            agree = False
        self._is_checked, self._upper = True, upper if agree else None
        return whole


def _equal(inputs: dict[str, Any], others: dict[str, Any]) -> bool:
    return inputs.keys() == others.keys() and all(
        torch.equal(value, others[name]) if isinstance(value, Tensor) else value == others[name]
        for name, value in inputs.items()
    )


def _of_blocks(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs that decide what blocks put out."""
    return {name: value for name, value in inputs.items() if name not in ("labels", "logits_to_keep")}


def _agree(whole: Tensor, part: Tensor) -> bool:
    """Whether logits give the same log-probabilities; some at a time, for the vocabulary makes temporaries large."""
    bound = SAME if whole.dtype == torch.float32 else SAME_IN_16_BITS
    tokens = (logits.flatten(0, -2).split(TOKENS_AT_ONCE) for logits in (whole, part))
    return whole.shape == part.shape and all(
        torch.allclose(one.float().log_softmax(-1), other.float().log_softmax(-1), rtol=0, atol=bound, equal_nan=True)
        for one, other in zip(*tokens, strict=True)
    )
