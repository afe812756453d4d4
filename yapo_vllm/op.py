"""The operator that steers a block within the engine's compiled graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from yapo_peft.errors import UnsupportedOperationError


def _block_named(name: str) -> Any:
    """What steers a block, from the engine's forward context."""
    from vllm.forward_context import get_forward_context  # pyright: ignore[reportMissingImports]

    return get_forward_context().no_compile_layers[name]


def _steer(hidden: Tensor, residual: Tensor, block: str) -> None:
    """Steers in place what a block puts out as a sum of two."""
    _block_named(block)(hidden, residual)


def _steer_one(hidden: Tensor, block: str) -> None:
    """Steers in place what a block puts out."""
    _block_named(block)(hidden, None)


def _nothing(*args: Any) -> None:
    """What a trace sees: the tensors keep their shapes."""


_library = torch.library.Library("yapo", "DEF")
_library.define("steer(Tensor(a!) hidden, Tensor(b!) residual, str block) -> ()")
_library.define("steer_one(Tensor(a!) hidden, str block) -> ()")
for _name, _function in {"steer": _steer, "steer_one": _steer_one}.items():
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"yapo::{_name}", _nothing, lib=_library)


def steer_output_of(block: nn.Module, name: str, d_model: int) -> None:
    """Lets the operator steer whatever a block puts out, from the next trace on.

    Args:
        block: A decoder block of vLLM, which puts out its hidden states, or these and a residual still to be added.
        name: Under which the forward context has what steers it.
        d_model: Width of the hidden states.
    """

    def steer(module: nn.Module, args: Any, output: Any) -> None:
        states = output if isinstance(output, tuple) else (output,)
        if len(states) > 2 or not all(_is_states(state, d_model) for state in states):
            raise UnsupportedOperationError(
                f"{type(module).__name__} puts out something else than hidden states, or hidden states and their "
                f"residual, of width {d_model}: this architecture cannot be steered."
            )
        flat = [state.view(-1, d_model) for state in states]
        if len(flat) == 1:
            torch.ops.yapo.steer_one(flat[0], name)
        else:
            torch.ops.yapo.steer(flat[0], flat[1], name)

    block.register_forward_hook(steer)


def _is_states(state: Any, d_model: int) -> bool:
    # The transformers backend has a batch of one row.
    return isinstance(state, Tensor) and state.shape[-1] == d_model and (state.dim() == 2 or state.shape[0] == 1)
