"""The layer that wraps a decoder block and steers its output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..errors import ConfigError, UnsupportedOperationError
from ..sae import FrozenSAE
from .blocks import hidden_states, with_hidden_states
from .positions import TokenSelector
from .steering import steering_shift

Strength = float | Tensor


class YaPOLayer(nn.Module, BaseTunerLayer):
    """A decoder block whose output is steered by the active adapters.

    Steering runs in the block's first forward hook rather than around it, so that whatever records the block's
    output (`output_hidden_states`, other hooks) sees the steered one, and gradient checkpointing of the block does
    not repeat it. Several active adapters each steer the block's own output, and their shifts add up.

    Attributes:
        yapo_code: The code of each adapter, `(d_sae,)` in float32: the only parameters.
        yapo_sae: The SAE of each adapter, shared and frozen.
        multiplier: The strength of each adapter, or one per row of the batch, `(batch,)`.
        positions: The tokens that each adapter steers.
        index: Which block this is.
        is_lowest: Whether no block below is steered: the gradient ends here.
        track_moved: Whether `moved_tokens` is kept.
        moved_tokens: Whether any feature of a token moved in the last steered forward, `(batch, seq)`.
    """

    adapter_layer_names: tuple[str, ...] = ("yapo_code",)
    other_param_names: tuple[str, ...] = ("yapo_sae", "multiplier", "positions")

    def __init__(self, base_layer: nn.Module, index: int, selector: TokenSelector) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.index = index
        self.is_lowest = True
        self.track_moved = False
        self.moved_tokens: Tensor | None = None
        self.yapo_code = nn.ParameterDict()
        self.yapo_sae: dict[str, FrozenSAE] = {}
        self.multiplier: dict[str, Strength] = {}
        self.positions: dict[str, str] = {}
        self._selector = selector
        self._hook = base_layer.register_forward_hook(self._steer_output, prepend=True)

    def update_layer(
        self, adapter_name: str, sae: FrozenSAE, *, multiplier: float, positions: str, init_weights: bool
    ) -> None:
        """Adds an adapter, or replaces one of the same name."""
        code = torch.zeros(sae.identity.d_sae, dtype=torch.float32)
        if not init_weights:
            code.normal_(std=0.02)
        self.yapo_code[adapter_name] = nn.Parameter(code)
        self.yapo_sae[adapter_name] = sae
        self.multiplier[adapter_name] = multiplier
        self.positions[adapter_name] = positions
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the block; the hook on it steers."""
        return self.base_layer(*args, **kwargs)

    def steer(self, h: Tensor) -> Tensor:
        """Steers the output of the block, `(batch, seq, d_model)`; returns `h` itself where nothing is to do."""
        steering = self.steering_adapters
        if not steering:
            return h
        if self.is_lowest:
            h = h.detach()
        steered = h
        for adapter_name in steering:
            sae = self.yapo_sae[adapter_name].weights(h.device, h.dtype)
            code, strength = self.yapo_code[adapter_name].to(h.device), self.multiplier[adapter_name]
            _require_rows(strength, len(h))
            shift, moved = steering_shift(h, code, sae, strength)
            mask = self._selector.mask(self.positions[adapter_name], h)
            if mask is not None:
                shift = shift.masked_fill(~mask[..., None], 0)
            if self.track_moved:
                any_moved = moved.detach().ne(0).any(dim=-1)
                self.moved_tokens = any_moved if mask is None else any_moved & mask
            steered = steered + shift
        return steered

    @property
    def steering_adapters(self) -> list[str]:
        """The adapters that change the output now: active, not disabled, and of a strength other than 0."""
        if self.disable_adapters:
            return []
        return [name for name in self.active_adapters if name in self.yapo_code and not self._is_off(name)]

    def unhook(self) -> None:
        """Leaves the block as it was found."""
        self._hook.remove()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Steering depends on the input wherever it cuts a feature, so no weight of the block can hold it."""
        raise UnsupportedOperationError(MERGE_REFUSED)

    def unmerge(self) -> None:
        """There is never anything to unmerge."""
        raise UnsupportedOperationError(MERGE_REFUSED)

    def __getattr__(self, name: str) -> Any:
        """Attributes that the model reads off its blocks, such as Gemma's `attention_type`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def _is_off(self, adapter_name: str) -> bool:
        multiplier = self.multiplier[adapter_name]
        return not isinstance(multiplier, Tensor) and multiplier == 0

    def _steer_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        hidden = hidden_states(output)
        steered = self.steer(hidden)
        return None if steered is hidden else with_hidden_states(output, steered)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name not in self.yapo_code:
            return
        code = self.yapo_code[adapter_name]
        own = next((parameter.device for parameter in self.base_layer.parameters()), code.device)
        target = own if device is None else device
        if "meta" not in (code.device.type, target.type):
            code.data = code.data.to(target, torch.float32)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> YaPOLayer:
        """Codes follow the model to another device, but stay in float32 when it is cast."""
        codes = {name: code.data for name, code in self.yapo_code.items()}
        super()._apply(fn, recurse)
        for name, code in self.yapo_code.items():
            if code.dtype != torch.float32:
                code.data = codes[name].to(code.device)
        return self


def _require_rows(strength: Strength, rows: int) -> None:
    if isinstance(strength, Tensor) and len(strength) != rows:
        raise ConfigError(
            f"multiplier has {len(strength)} values for a batch of {rows} rows: give one per row. Beam search and "
            "num_return_sequences repeat each row: repeat its multiplier as often."
        )


MERGE_REFUSED = (
    "A YaPO adapter cannot be merged: where steering cuts a feature, its shift depends on the token, and no weight of "
    "the model can hold it. Keep the adapter attached, or call unload() for the model without it."
)
