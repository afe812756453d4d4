"""Evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Within it, a model is in evaluation mode; after it, each of its modules is in the mode that it was in.

    Of each, because they differ: a fresh `PeftModel` says that it trains, around a model that does not.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
