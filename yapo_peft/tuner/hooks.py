"""Forward hooks: temporary ones that read or change the outputs of layers, and hooks under gradient checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import __version__ as transformers_version
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import UnsupportedOperationError
from .blocks import base_of, hidden_states, with_hidden_states

if TYPE_CHECKING:
    from .layer import YaPOLayer

# Whether gradient checkpointing, as in transformers 5.19, calls the hooks of a layer again in the backward pass.
REPEATS_HOOKS = "__call__" in vars(GradientCheckpointingLayer)


@contextmanager
def forward_hooks(hooks: Iterable[tuple[nn.Module, Callable[[Any], Any]]], *, prepend: bool = False) -> Generator[None]:
    """Registers forward hooks, and removes them on exit.

    Args:
        hooks: Modules, and a function of the output of each; what it returns, unless None, replaces the output.
        prepend: Whether to run before the hooks that are there, such as the one that steers.
    """
    with ExitStack() as stack:
        for module, hook in hooks:
            stack.enter_context(module.register_forward_hook(partial(_call, hook), prepend=prepend))
        yield


@contextmanager
def block_outputs(layers: Iterable[YaPOLayer]) -> Generator[dict[int, Tensor]]:
    """Yields a dict that keeps the last output of each steered layer, `(batch, seq, d_model)`, by its index."""
    outputs: dict[int, Tensor] = {}

    def keep(index: int, output: Any) -> None:
        outputs[index] = hidden_states(output)

    with forward_hooks((layer.block, partial(keep, layer.index)) for layer in layers):
        yield outputs


class _StopForward(Exception):  # noqa: N818
    """Ends a forward pass after the highest layer that is read."""


def run_up_to(model: nn.Module, blocks: Mapping[int, nn.Module], inputs: dict[str, Tensor]) -> dict[int, Tensor]:
    """Runs a model up to the highest of some layers; returns the outputs of all of them, `(batch, seq, d_model)`.

    Layers above do run if accelerate offloads weights layer by layer.

    Args:
        model: The model.
        blocks: The layers to read, by their indices.
        inputs: What the model is called with.
    """
    base, outputs = base_of(model), dict[int, Tensor]()
    can_stop = not any(hasattr(module, "_hf_hook") for module in base.modules())

    def keep(index: int, output: Any) -> None:
        outputs[index] = hidden_states(output)
        if can_stop and index == max(blocks):
            raise _StopForward

    with forward_hooks((block, partial(keep, index)) for index, block in blocks.items()), suppress(_StopForward):
        base.base_model(**inputs, use_cache=False)
    return outputs


@contextmanager
def changed_outputs(changes: Iterable[tuple[YaPOLayer, Callable[[Tensor, Tensor], Tensor]]]) -> Generator[None]:
    """Replaces the outputs of layers by functions of the output before steering and the one after it."""
    changes = list(changes)
    before: dict[int, Tensor] = {}

    def keep(index: int, output: Any) -> None:
        before[index] = hidden_states(output)

    def replace(index: int, change: Callable[[Tensor, Tensor], Tensor], output: Any) -> Any:
        return with_hidden_states(output, change(before[index], hidden_states(output)))

    with (
        forward_hooks(((layer.block, partial(keep, layer.index)) for layer, _ in changes), prepend=True),
        forward_hooks((layer.block, partial(replace, layer.index, change)) for layer, change in changes),
    ):
        yield


def require_single_hooks(block: nn.Module | None = None) -> None:
    """Raises if gradient checkpointing would steer a layer again in the backward pass, at the multiplier of that time.

    Args:
        block: A decoder layer that may be checkpointed; None if that is known.

    Raises:
        UnsupportedOperationError: The installed version of transformers runs hooks twice.
    """
    is_checkpointed = block is None or (block.training and getattr(block, "gradient_checkpointing", False))
    if REPEATS_HOOKS and is_checkpointed:
        raise UnsupportedOperationError(
            f"Gradient checkpointing of transformers {transformers_version} runs the hooks of a layer again in the "
            "backward pass, where another multiplier may hold: use transformers 5.23 or later, or train without it."
        )


def _call(hook: Callable[[Any], Any], module: nn.Module, args: Any, output: Any) -> Any:
    return hook(output)
