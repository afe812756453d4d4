"""Tokens as they are generated, and an end to it when nobody reads them."""

from __future__ import annotations

import queue
import threading
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer


class RowStreamer(BaseStreamer):
    """Puts the tokens of each step, `(rows,)`, into a queue; the prompt is left out."""

    def __init__(self, steps: queue.Queue[Any]) -> None:
        self._steps = steps
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        """Takes the tokens of a step; first those of the prompt."""
        if not self._is_prompt:
            self._steps.put(value.cpu())
        self._is_prompt = False

    def end(self) -> None:
        """Nothing more comes."""


class StopWhenSet(StoppingCriteria):
    """Ends a generation that nobody waits for any more."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # pyright: ignore
        """Whether each row is done, `(rows,)`."""
        return torch.full((len(input_ids),), self._stop.is_set(), device=input_ids.device)
