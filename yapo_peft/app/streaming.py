"""Streams tokens while they are generated, and stops when they are not needed."""

from __future__ import annotations

import queue
import threading
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer


class RowStreamer(BaseStreamer):
    """Puts the new tokens of each step, `(rows,)`, into a queue."""

    def __init__(self, steps: queue.Queue[Any]) -> None:
        self._steps = steps
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        """Receives the prompt's tokens first, and then those of each step."""
        if not self._is_prompt:
            self._steps.put(value.cpu())
        self._is_prompt = False

    def end(self) -> None:
        """Does nothing: the end is known otherwise."""


class StopWhenSet(StoppingCriteria):
    """Stops a generation when an event is set."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # pyright: ignore
        """Whether each row is done, `(rows,)`."""
        return torch.full((len(input_ids),), self._stop.is_set(), device=input_ids.device)
