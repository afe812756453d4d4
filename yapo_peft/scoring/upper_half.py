"""Runs only the layers above the lowest steered one, on that layer's output from an earlier pass."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..tuner.blocks import decoder_blocks, hidden_states, with_hidden_states
from ..tuner.hooks import forward_hooks


class UpperHalf:
    """The part of a causal language model that depends on the code.

    The model's own forward and all hooks run. Within `given`, the layers below the lowest steered one return their
    input, and that one returns the given output, whatever the architecture.

    Args:
        model: The causal language model, without PEFT's wrapper.
        lowest: Index of the lowest steered layer.
    """

    def __init__(self, model: nn.Module, lowest: int) -> None:
        self.model = model
        self._lower = list(decoder_blocks(model)[1])[: lowest + 1]
        self._outputs: list[Any] = []

    @contextmanager
    def observed(self, found: list[Tensor]) -> Generator[None]:
        """Appends the output of the lowest steered layer before steering to a list.

        Records the form of the layers' outputs, too, for `given`.
        """
        outputs: dict[int, Any] = {}

        def keep(index: int, output: Any) -> None:
            # Other outputs, such as attention weights, are not passed on.
            outputs[index] = output if isinstance(output, Tensor) else (None,) * len(output)

        def find(output: Any) -> None:
            found.append(hidden_states(output).detach())

        with (
            forward_hooks((layer, partial(keep, index)) for index, layer in enumerate(self._lower)),
            forward_hooks([(self._lower[-1], find)], prepend=True),
        ):
            yield
        self._outputs = [outputs[index] for index in range(len(self._lower))]

    @contextmanager
    def given(self, hidden: Tensor) -> Generator[None]:
        """Makes the lowest steered layer output `hidden`, `(rows, length, d_model)`, and skips the layers below."""

        def passing(form: Any, replacement: Tensor | None) -> Callable[..., Any]:
            def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
                passed = hidden_states if replacement is None else replacement
                return with_hidden_states(form, passed)

            return forward

        replaced = [(layer, layer.__dict__.get("forward")) for layer in self._lower]
        try:
            for index, layer in enumerate(self._lower):
                last = index == len(self._lower) - 1
                layer.__dict__["forward"] = passing(self._outputs[index], hidden if last else None)
            yield
        finally:
            for layer, own in replaced:
                if own is None:
                    layer.__dict__.pop("forward", None)
                else:
                    layer.__dict__["forward"] = own
