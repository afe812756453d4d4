"""The operator that steers a layer within the engine's compiled graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from yapo_peft.errors import UnsupportedOperationError


def _layer_named(name: str) -> Any:
    """Looks up the steering of a layer in the engine's forward context."""
    from vllm.forward_context import get_forward_context  # pyright: ignore[reportMissingImports]

    return get_forward_context().no_compile_layers[name]


def _steer(hidden: Tensor, residual: Tensor, layer: str) -> None:
    """Steers in place a layer's output that is the sum of two tensors."""
    _layer_named(layer)(hidden, residual)


def _steer_one(hidden: Tensor, layer: str) -> None:
    """Steers a layer's output in place."""
    _layer_named(layer)(hidden, None)


def _nothing(*args: Any) -> None:
    """The fake implementation: shapes do not change."""


_library = torch.library.Library("yapo", "DEF")
_library.define("steer(Tensor(a!) hidden, Tensor(b!) residual, str layer) -> ()")
_library.define("steer_one(Tensor(a!) hidden, str layer) -> ()")
for _name, _function in {"steer": _steer, "steer_one": _steer_one}.items():
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"yapo::{_name}", _nothing, lib=_library)


def steer_output_of(layer: nn.Module, name: str, d_model: int) -> None:
    """Lets the operator steer a layer's output, from the next trace on.

    Args:
        layer: A decoder layer of vLLM, which returns its hidden states, or these and a residual still to be added.
        name: The name of its steering in the forward context.
        d_model: Width of the hidden states.
    """

    def steer(module: nn.Module, args: Any, output: Any) -> None:
        states = output if isinstance(output, tuple) else (output,)
        if len(states) > 2 or not all(_is_states(state, d_model) for state in states):
            raise UnsupportedOperationError(
                f"{type(module).__name__} returns neither hidden states nor hidden states and their residual, of width "
                f"{d_model}: this architecture cannot be steered."
            )
        flat = [state.view(-1, d_model) for state in states]
        if len(flat) == 1:
            torch.ops.yapo.steer_one(flat[0], name)
        else:
            torch.ops.yapo.steer(flat[0], flat[1], name)

    layer.register_forward_hook(steer)


def _is_states(state: Any, d_model: int) -> bool:
    # The transformers backend adds a batch dimension of 1.
    return isinstance(state, Tensor) and state.shape[-1] == d_model and (state.dim() == 2 or state.shape[0] == 1)
