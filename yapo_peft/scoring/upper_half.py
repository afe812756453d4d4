"""Runs only the blocks above the lowest steered one, on what that block put out for the same tokens before."""

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

    The model's own forward runs, and so do all hooks. Within `given`, the blocks up to the lowest steered one only pass
    on what they get, and that one puts out what it is given; nothing is known here of any architecture.

    Args:
        model: The causal language model, without PEFT's wrapper.
        lowest: Index of the lowest steered block.
    """

    def __init__(self, model: nn.Module, lowest: int) -> None:
        self.model = model
        self._lower = list(decoder_blocks(model)[1])[: lowest + 1]
        self._outputs: list[Any] = []

    @contextmanager
    def observed(self, found: list[Tensor]) -> Generator[None]:
        """Within it, what the lowest steered block puts out, before it is steered, is added to a list.

        The form of the blocks' outputs is learned too, for `given`.
        """
        outputs: dict[int, Any] = {}

        def keep(index: int, output: Any) -> None:
            # Other outputs, such as attention weights, are not passed on.
            outputs[index] = output if isinstance(output, Tensor) else (None,) * len(output)

        def find(output: Any) -> None:
            found.append(hidden_states(output).detach())

        with (
            forward_hooks((block, partial(keep, index)) for index, block in enumerate(self._lower)),
            forward_hooks([(self._lower[-1], find)], prepend=True),
        ):
            yield
        self._outputs = [outputs[index] for index in range(len(self._lower))]

    @contextmanager
    def given(self, hidden: Tensor) -> Generator[None]:
        """Within it, the lowest steered block puts out `hidden`, `(rows, length, d_model)`, and no block below runs."""

        def passing(form: Any, put_out: Tensor | None) -> Callable[..., Any]:
            def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
                passed = hidden_states if put_out is None else put_out
                return with_hidden_states(form, passed)

            return forward

        replaced = [(block, block.__dict__.get("forward")) for block in self._lower]
        for index, block in enumerate(self._lower):
            last = index == len(self._lower) - 1
            block.__dict__["forward"] = passing(self._outputs[index], hidden if last else None)
        try:
            yield
        finally:
            for block, own in replaced:
                if own is None:
                    del block.__dict__["forward"]
                else:
                    block.__dict__["forward"] = own
