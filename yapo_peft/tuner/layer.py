"""The module that steers the output of a decoder layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import align_module_device
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..errors import ConfigError, UnsupportedOperationError
from ..sae import FrozenSAE
from ..steering.folded import FoldedSteering
from ..steering.formula import Multiplier, dense_shift, steering_shift
from ..steering.learning import ActiveFeatures, sparse_shift
from .blocks import CHILD_NAME, hidden_states, with_hidden_states
from .call import Call
from .config import YaPOConfig
from .hooks import require_single_hooks
from .positions import tokens_to_steer


class Code(nn.Parameter):
    """A code, in float32 even if a trainer assigns `.data` in another dtype, as TRL does for quantised models."""

    @property
    def data(self) -> Tensor:
        """The values, `(d_sae,)` in float32."""
        return torch.Tensor.data.__get__(self)  # pyright: ignore

    @data.setter
    def data(self, value: Tensor) -> None:
        torch.Tensor.data.__set__(self, value.float())  # pyright: ignore


class YaPOLayer(nn.Module, BaseTunerLayer):
    """Steers the output of a decoder layer (`block`), of which it is a child module.

    The decoder layer keeps its place and its class, so that other adapters can be injected into it, before or after,
    and code that looks for decoder layers finds it. Steering runs in its first forward hook: whatever records its
    output (`output_hidden_states`, other hooks) sees the steered one, and gradient checkpointing does not repeat it.
    The shifts of several active adapters, each computed from the unsteered output, add up.

    Attributes:
        yapo_code: The code of each adapter, `(d_sae,)` in float32, or `(d_model,)` if dense: the only parameters.
        yapo_sae: The SAE of each adapter, shared and frozen; None if dense.
        multiplier: The multiplier of each adapter, or one per row of the batch, `(batch,)`.
        positions: The tokens that each adapter steers.
        clamps: Whether each adapter holds features at the values of its code.
        index: Index of the decoder layer.
        call: The current call of the model, shared by all its steered layers.
        merged_adapters: The adapters whose shift was folded into a bias.
        replaced_biases: The modules whose bias merging replaced, and their original biases.
        track_moved: Whether to record `moved_tokens`.
        moved_tokens: Whether any feature of a token moved in the last steered forward, `(batch, seq)`.
    """

    adapter_layer_names: tuple[str, ...] = ("yapo_code",)
    other_param_names: tuple[str, ...] = ("yapo_sae", "multiplier", "positions", "clamps")

    def __init__(self, block: nn.Module, index: int, call: Call) -> None:
        super().__init__()
        self.index = index
        self.call = call
        self.track_moved = False
        self.moved_tokens: Tensor | None = None
        self.yapo_code = nn.ParameterDict()
        self.yapo_sae: dict[str, FrozenSAE | None] = {}
        self.multiplier: dict[str, Multiplier] = {}
        self.positions: dict[str, str] = {}
        self.clamps: dict[str, bool] = {}
        self.merged_adapters: list[str] = []
        self.replaced_biases: list[tuple[Any, nn.Parameter | None]] = []
        self._folded: dict[str, FoldedSteering] = {}
        self._frozen: list[str] = []
        # In a list, because the decoder layer is the parent of this module, not its child.
        self._parent = [block]
        self._hook = block.register_forward_hook(self._steer_output, prepend=True)
        block.add_module(CHILD_NAME, self)
        call.layers = sorted([*call.layers, self], key=lambda layer: layer.index)
        self.train(block.training)

    @property
    def block(self) -> nn.Module:
        """The decoder layer whose output is steered."""
        return self._parent[0]

    def update_layer(self, adapter_name: str, config: YaPOConfig, size: int) -> None:
        """Adds an adapter with a code of `size` entries, or replaces one of that name. Set its SAE afterwards."""
        code = torch.zeros(size, dtype=torch.float32)
        if not config.init_weights:
            code.normal_(std=0.02)
        self.yapo_code[adapter_name] = Code(code)
        self.multiplier[adapter_name] = config.multiplier
        self.positions[adapter_name] = config.positions
        self.clamps[adapter_name] = config.mode == "clamp"
        self._folded.pop(adapter_name, None)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def forward(self, h: Tensor) -> Tensor:
        """Steers the decoder layer's output, `(batch, seq, d_model)`. Returns `h` unchanged if no adapter steers."""
        shares = list(self._shares(len(h)))
        if not shares or h.is_meta:  # which has shapes only
            return h
        if self.is_lowest:
            h = h.detach()
        steered = h
        moved_tokens = torch.zeros(h.shape[:2], dtype=torch.bool, device=h.device) if self.track_moved else None
        for adapter_name, multiplier, rows in shares:
            shift, moved = self._shift(adapter_name, multiplier, h if rows is None else h[rows])
            positions = self.positions[adapter_name]
            mask = None if positions == "all" else tokens_to_steer(positions, h, self.call)
            if mask is not None:
                mask = mask if rows is None else mask[rows]
                shift = shift.masked_fill(~mask[..., None], 0)
            if moved_tokens is not None and moved is not None:
                moved_tokens[slice(None) if rows is None else rows] |= moved if mask is None else moved & mask
            index = None if rows is None else torch.tensor(rows, dtype=torch.long, device=h.device)
            steered = steered + shift if index is None else steered.index_add(0, index, shift)
        self.moved_tokens = moved_tokens
        return steered

    def _shift(self, adapter_name: str, multiplier: Multiplier, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the shift of the rows that an adapter steers, shaped as `h`, and which tokens moved, if tracked.

        All paths are equivalent; each computes only what can differ between tokens.
        """
        sae, code, clamps = self.yapo_sae[adapter_name], self.code(adapter_name), self.clamps[adapter_name]
        learns = code.requires_grad and torch.is_grad_enabled() and not (clamps and not self.training)
        if learns and clamps:
            raise UnsupportedOperationError(
                "An adapter of mode='clamp' is not trained: call model.eval(), or freeze its code with "
                "requires_grad_(False) to train something else."
            )
        if learns and self.training:
            self.call.require_labels(self.positions[adapter_name])
        if sae is None:
            return dense_shift(h, code.to(h.device), multiplier)
        if torch.compiler.is_compiling():
            shift, features = steering_shift(h, code.to(h.device), sae.weights(h.device, h.dtype), multiplier, clamps)
            return shift, features.detach().ne(0).any(dim=-1)
        if not learns:
            return self._folded_for(adapter_name, sae, multiplier, h).shift(h, multiplier, self.track_moved)
        constant, active = h.detach(), self.call.features if self.is_lowest else None
        if active is None:
            active = ActiveFeatures.of(constant, sae.weights(h.device, h.dtype))
        decoder = sae.decoder(h.device, h.dtype)
        shift, moved = sparse_shift(constant, code.to(h.device), decoder, multiplier, active)
        if h.requires_grad:
            # Adds only the gradient of the activations, which passes through the features that are cut.
            folded, _ = self._folded_for(adapter_name, sae, multiplier, h).shift(h, multiplier, track=False)
            shift = shift + (folded - folded.detach())
        return shift, moved

    def _folded_for(self, adapter_name: str, sae: FrozenSAE, multiplier: Multiplier, h: Tensor) -> FoldedSteering:
        """Returns the folded steering of an adapter, recomputed if its code, multiplier, device or dtype changed."""
        code, kept = self.code(adapter_name).detach(), self._folded.get(adapter_name)
        if kept is None or not kept.still_holds(code, sae, multiplier, h, self.call.generation):
            kept = FoldedSteering.of(code, sae, multiplier, h, self.call.generation, self.clamps[adapter_name])
            self._folded[adapter_name] = kept
        return kept

    @property
    def is_lowest(self) -> bool:
        """Whether no adapter in use steers a lower layer, so that the gradient ends here."""
        lowest = lowest_steered(self.call.layers)
        return lowest is None or self.index <= lowest.index

    @property
    def used_adapters(self) -> list[str]:
        """The adapters of the current call: those of its rows, or else the active ones."""
        if self.call.adapter_names is None:
            return self.active_adapters
        return sorted(set(self.call.adapter_names))

    @property
    def enabled_adapters(self) -> list[str]:
        """The adapters in use at this layer, whatever their multiplier; none if adapters are disabled or merged."""
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.used_adapters if name in self.yapo_code]

    @property
    def steering_adapters(self) -> list[str]:
        """The enabled adapters whose multiplier is not 0."""
        return [name for name in self.enabled_adapters if not self._is_off(name)]

    def code(self, adapter_name: str) -> Tensor:
        """Returns the code of an adapter, `(d_sae,)`; a copy if accelerate has offloaded it."""
        if not self.yapo_code[adapter_name].is_meta:
            return self.yapo_code[adapter_name]
        with align_module_device(self.yapo_code):
            return self.yapo_code[adapter_name].detach().clone()

    def effective_code(self, adapter_name: str) -> Tensor:
        """Returns the code of an adapter times its current multiplier, `(d_sae,)`.

        Raises:
            ConfigError: The multiplier differs by row.
        """
        multiplier = self.multiplier[adapter_name]
        if isinstance(multiplier, Tensor):
            raise ConfigError(f"The multiplier of {adapter_name!r} differs by row: set one with set_multiplier first.")
        return multiplier * self.code(adapter_name).detach()

    def detach_from_block(self) -> None:
        """Removes this module and its hook from the decoder layer."""
        self._hook.remove()
        delattr(self.block, CHILD_NAME)
        self.call.layers = [layer for layer in self.call.layers if layer is not self]

    def activate(self, adapter_names: list[str]) -> None:
        """Makes adapters the active ones; unlike `set_adapter`, leaves alone which parameters are trainable."""
        self._active_adapter = adapter_names

    def enable_adapters(self, enabled: bool) -> None:
        """As PEFT's; disabling unmerges, and enabling leaves frozen what was frozen before."""
        if not enabled and self.merged:
            self.unmerge()
        if not enabled and not self.disable_adapters:
            active = set(self.active_adapters) & set(self.yapo_code)
            self._frozen = [name for name in active if not self.yapo_code[name].requires_grad]
        super().enable_adapters(enabled)
        if enabled:
            for name in set(self._frozen) & set(self.yapo_code):
                self.yapo_code[name].requires_grad_(False)
            self._frozen = []

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Only the tuner of another method calls this: `YaPOModel` merges all layers together."""
        raise UnsupportedOperationError(
            "A YaPO adapter cannot be merged together with another method's. Merge it through the PeftModel that "
            "get_peft_model(model, YaPOConfig(...)) returned."
        )

    def unmerge(self) -> None:
        """Restores the biases that merging replaced."""
        self.restore_biases(0)
        self.merged_adapters = []

    def restore_biases(self, kept: int) -> None:
        """Restores the biases that merging replaced, except for the first ones."""
        while len(self.replaced_biases) > kept:
            projection, bias = self.replaced_biases.pop()
            projection.bias = bias

    def _shares(self, batch: int) -> Iterator[tuple[str, Multiplier, list[int] | None]]:
        """Yields each adapter that steers, its multiplier, and the rows that it steers; None for all."""
        if self.merged and (self.call.adapter_names is not None or self.call.multipliers is not None):
            raise ConfigError("adapter_names= and multipliers= need unmerged adapters: call unmerge_adapter() first.")
        if self.call.adapter_names is not None:
            self.call.rows_of("__base__", batch)  # raises if it has another number of names
        for name in self.steering_adapters:
            multiplier = self.multiplier[name] if self.call.multipliers is None else self.call.multipliers
            rows = self.call.rows_of(name, batch)
            if isinstance(multiplier, Tensor):
                multiplier = self.call.per_row(multiplier, batch)
                multiplier = multiplier if rows is None else multiplier[rows]
            yield name, multiplier, rows

    def _is_off(self, adapter_name: str) -> bool:
        multiplier = self.multiplier[adapter_name]
        return self.call.multipliers is None and not isinstance(multiplier, Tensor) and multiplier == 0

    def _steer_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        hidden = hidden_states(output)
        if hidden.dim() != 3:
            raise UnsupportedOperationError(
                f"{type(module).__name__} returns hidden states of shape {tuple(hidden.shape)}, but steering expects "
                "(batch, seq, d_model): this architecture is not supported."
            )
        if self.call.multipliers is not None or self.call.adapter_names is not None:
            require_single_hooks(module)
        steered = self(hidden)
        return None if steered is hidden else with_hidden_states(output, steered)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the folded steering, which can be recomputed, out of copies and pickles."""
        return {**self.__dict__, "_folded": {}}

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name not in self.yapo_code:
            return
        code = self.yapo_code[adapter_name]
        own = next((p.device for name, p in self.block.named_parameters() if CHILD_NAME not in name), code.device)
        target = own if device is None else device
        if "meta" not in (code.device.type, target.type):
            code.data = code.data.to(target, torch.float32)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> YaPOLayer:
        """Moves codes with the model to another device, but keeps them in float32."""
        codes = {name: code.data for name, code in self.yapo_code.items()}
        super()._apply(fn, recurse)
        for name, code in self.yapo_code.items():
            if "meta" not in (code.device.type, codes[name].device.type):
                code.data = codes[name].to(code.device)
        return self


def lowest_steered(layers: list[YaPOLayer]) -> YaPOLayer | None:
    """Returns the first of the layers, ordered from the bottom up, that an adapter in use steers, if any."""
    return next((layer for layer in layers if any(name in layer.yapo_code for name in layer.used_adapters)), None)
