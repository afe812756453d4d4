"""What steered blocks put out, for those who only look."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .blocks import hidden_states
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
