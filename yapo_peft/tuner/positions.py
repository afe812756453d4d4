"""Which tokens of a forward pass are steered."""

from __future__ import annotations

import inspect
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

Positions = Literal["all", "completion", "last"]
POSITIONS: tuple[str, ...] = get_args(Positions)


class TokenSelector:
    """Watches the inputs of a model and says which of the current tokens an adapter may steer.

    - "all": every token.
    - "completion": tokens of the completion. With labels, those whose label is not -100; while generating, those
      fed once the cache holds something; otherwise none, because all is prompt.
    - "last": every token from which the next token is predicted: the last one of each row, and with labels all
      tokens whose next label is not -100, which are the same positions in training as in generation.

    It is one forward pre-hook on the model, shared by all its steered layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = list(inspect.signature(type(model).forward).parameters)[1:]
        self._labels: Tensor | None = None
        self._attention_mask: Tensor | None = None
        self._has_past = False
        self._handle = model.register_forward_pre_hook(self._observe, with_kwargs=True)

    def remove(self) -> None:
        """Stops watching."""
        self._handle.remove()

    def mask(self, positions: str, hidden: Tensor) -> Tensor | None:
        """Tokens to steer.

        Args:
            positions: One of `POSITIONS`.
            hidden: The current hidden states, `(batch, seq, d_model)`.

        Returns:
            A boolean mask `(batch, seq)`, or None for all tokens.
        """
        if positions == "all":
            return None
        batch, seq = hidden.shape[:2]
        if self._labels is not None:
            scored = self._labels.to(hidden.device) != -100
            if positions == "completion":
                return scored
            predicts = torch.zeros_like(scored)
            predicts[:, :-1] = scored[:, 1:]
            return predicts | scored
        if positions == "completion":
            return torch.full((batch, seq), self._has_past, device=hidden.device)
        index = torch.arange(seq, device=hidden.device)
        if self._attention_mask is None or self._attention_mask.dim() != 2:
            return (index == seq - 1).expand(batch, seq)
        attended = self._attention_mask[:, -seq:].to(hidden.device) != 0
        return index == (attended * index).argmax(dim=1, keepdim=True)

    def _observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        self._labels = inputs.get("labels")
        self._attention_mask = inputs.get("attention_mask")
        past = inputs.get("past_key_values")
        self._has_past = past is not None and past.get_seq_length() > 0
