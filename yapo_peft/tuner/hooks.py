"""What steered blocks put out, for those who look, and for those who change it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .blocks import hidden_states, with_hidden_states
from .layer import YaPOLayer


@contextmanager
def block_outputs(layers: Iterable[YaPOLayer]) -> Generator[dict[int, Tensor]]:
    """Within it, the last outputs of steered blocks are kept, `(batch, seq, d_model)` by the block's index."""
    outputs: dict[int, Tensor] = {}

    def keep(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            outputs[index] = hidden_states(output)

        return hook

    handles = [layer.block.register_forward_hook(keep(layer.index)) for layer in layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def changed_outputs(changes: Iterable[tuple[YaPOLayer, Callable[[Tensor, Tensor], Tensor]]]) -> Generator[None]:
    """Within it, blocks put out what is made of their output, given what it was before steering and after it."""
    before: dict[int, Tensor] = {}

    def keep(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            before[index] = hidden_states(output)

        return hook

    def replace(index: int, change: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            return with_hidden_states(output, change(before.pop(index), hidden_states(output)))

        return hook

    changes = list(changes)
    handles = [layer.block.register_forward_hook(keep(layer.index), prepend=True) for layer, _ in changes]
    handles += [layer.block.register_forward_hook(replace(layer.index, change)) for layer, change in changes]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
