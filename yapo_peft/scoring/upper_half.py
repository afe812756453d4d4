"""Runs only the blocks above the lowest steered one, on what that block put out for the same tokens before."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..tuner.blocks import decoder_blocks, hidden_states, with_hidden_states


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

        def keep(index: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                # What else a block puts out (attention weights) is not passed on.
                outputs[index] = output if isinstance(output, Tensor) else (None,) * len(output)

            return hook

        def find(module: nn.Module, args: Any, output: Any) -> None:
            found.append(hidden_states(output).detach())

        handles = [block.register_forward_hook(keep(index)) for index, block in enumerate(self._lower)]
        # Before the hook that steers it.
        handles.append(self._lower[-1].register_forward_hook(find, prepend=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
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
