"""Lets TRL's loss run twice on one forward pass."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

from torch import Tensor


class Replay:
    """Stands for the model: runs the scoring forward once, and answers later ones with its result.

    Args:
        model: What scores.
        order: In which order its rows are to be returned, if that is another one than it returns them in.
    """

    def __init__(self, model: Callable[..., Any], order: Tensor | None = None) -> None:
        self._model = model
        self._order = order
        self._scored: Any = None

    def __call__(self, **kwargs: Any) -> Any:
        """Scores the batch the first time; other forwards go to the model."""
        if not kwargs.get("fused_lm_head"):
            return self._model(**kwargs)
        if self._scored is None:
            self._scored = self._model(**kwargs)
            if self._order is not None:
                self._take(self._order, len(self._order))
        return self._scored

    @property
    def log_probs(self) -> Tensor:
        """Log-probabilities of the answers' tokens, `(2 * pairs, seq - 1)`, in nats."""
        return self._scored.log_probs.detach()

    @property
    def log_probs_with_gradient(self) -> Tensor:
        """The same, before `reorder`, for a loss."""
        return self._scored.log_probs

    def of_rows(self, rows: Tensor) -> Replay:
        """The same for some rows of the batch, without gradient."""
        part = Replay(self._model)
        part._scored = copy(self._scored)
        part._detach()
        part._take(rows, len(self.log_probs))
        return part

    def reorder(self, order: Tensor) -> None:
        """Reorders the rows of the result, and ends its gradient."""
        self._detach()
        self._take(order, len(order))

    def _detach(self) -> None:
        for name, value in list(self._scored.items()):
            self._scored[name] = value.detach() if isinstance(value, Tensor) else value

    def _take(self, rows: Tensor, batch: int) -> None:
        for name, value in list(self._scored.items()):
            if isinstance(value, Tensor) and value.dim() > 0 and len(value) == batch:
                self._scored[name] = value[rows.to(value.device)]
