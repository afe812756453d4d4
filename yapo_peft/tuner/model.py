"""The tuner: attaches steered layers to a model, and implements PEFT's interface to them."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..errors import ConfigError, UnsupportedOperationError
from .adapters import steered_layers
from .attaching import keep_backward, require_adapter_name, require_head, resolve
from .blocks import CHILD_NAME, hidden_size
from .call import Call
from .combine import combine_codes, require_combinable
from .config import YaPOConfig
from .layer import YaPOLayer
from .merging import complete_biases, merge_adapters
from .state_dict import from_file, to_file


class YaPOModel(BaseTuner):
    """Attaches a `YaPOLayer` to each steered decoder layer. Created by `peft.get_peft_model`."""

    prefix: str = "yapo_"
    tuner_layer_cls = YaPOLayer
    target_module_mapping: dict[str, list[str]] = {}

    def __init__(
        self, model: nn.Module, peft_config: PeftConfig | dict[str, PeftConfig], adapter_name: str, **kwargs: Any
    ) -> None:
        # PeftModel passes a dict. A single config comes from direct injection, or, if it is for inference and was saved
        # before, from transformers' loader, which matches tensors by name and cannot unpack codes.
        if isinstance(peft_config, YaPOConfig) and peft_config.inference_mode and peft_config.was_attached:
            raise UnsupportedOperationError(
                "transformers' load_adapter (and AutoModelForCausalLM.from_pretrained on an adapter's folder) cannot "
                "read YaPO's codes. Load the adapter with peft.PeftModel.from_pretrained(model, folder) or "
                "peft.AutoPeftModelForCausalLM.from_pretrained(folder)."
            )
        if not isinstance(peft_config, dict):
            super().__init__(model, peft_config, adapter_name, **kwargs)
            return
        require_head(model, peft_config[adapter_name])
        others = getattr(model, "peft_config", None)
        others_before = dict(others or {})
        super().__init__(model, peft_config, adapter_name, **kwargs)
        if isinstance(others, dict):
            # PEFT adds its configs to those of another method's adapters in the model; keep them apart.
            others.clear()
            others.update(others_before)
            self.peft_config = peft_config
            cast(Any, model).peft_config = others

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> bool:
        return key in (cast(YaPOConfig, peft_config).target_modules or ())

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = cast(YaPOConfig, peft_config)
        position = (config.target_modules or []).index(current_key)
        layer = getattr(target, CHILD_NAME, None)
        if not isinstance(layer, YaPOLayer):
            layer = YaPOLayer(target, config.layer_indices()[position], self._call() or Call(self.model))
        layer.update_layer(
            adapter_name, config, size=config.recorded_sae(position).get("d_sae") or hidden_size(self.model)
        )
        if adapter_name not in self.active_adapters:
            layer.yapo_code[adapter_name].requires_grad_(False)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's. Loads the SAEs first, before the model changes and outside of PEFT's context for the meta device.

        A `state_dict`, from whose names PEFT would infer the modules, is not needed: the config names the layers.

        Raises:
            ConfigError: The name cannot name an adapter, or the config does not fit the model.
            SAEMismatchError: An SAE was trained on another model or layer, or is not the one that the config records.
            UnsupportedOperationError: The architecture, or what its 4-bit weights are packed for, is not supported.
        """
        config = cast(YaPOConfig, self.peft_config[adapter_name])
        require_adapter_name(self.model, adapter_name, config.blocks)
        if not config.inference_mode:
            keep_backward(self.model)
        saes = resolve(self.model, config)
        super().inject_adapter(model, adapter_name, *args, **{**kwargs, "state_dict": None})
        for layer in steered_layers(self.model):
            if layer.index in saes:
                layer.yapo_sae[adapter_name] = saes[layer.index]

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's, but activates the same remaining adapter in all layers, where PEFT lets each layer choose."""
        others = [name for name in self.active_adapters if name != adapter_name]
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        remaining = others or list(self.peft_config)[:1]
        if was_active and remaining:
            self.set_adapter(remaining)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        """As PEFT's, but leaves other methods' adapters in the model alone.

        Raises:
            UnsupportedOperationError: They would be disabled within a call of another thread or task.
        """
        call = self._call()
        if call is not None and not enabled:
            call.claims.require_free("multiplier")
        for module in [*steered_layers(self.model), *self._saved_modules().values()]:
            module.enable_adapters(enabled)

    def _saved_modules(self) -> dict[str, AuxiliaryTrainingWrapper]:
        """The modules of `modules_to_save`, by name."""
        wrappers = {n: m for n, m in self.model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)}
        own = self.peft_config.keys()
        return {n: m for n, m in wrappers.items() if m._adapters & own}  # pyright: ignore[reportPrivateUsage]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' `generate`; `multipliers=`, `(batch,)`, sets a multiplier for each prompt."""
        call, multipliers = self._call(), kwargs.pop("multipliers", None)
        if call is None:
            return cast(Any, self.model).generate(*args, **kwargs)
        with call.generating(args, kwargs, self.model.generation_config, multipliers):
            return cast(Any, self.model).generate(*args, **kwargs)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's.

        Raises:
            ConfigError: Others would become active within `steering`, which activates those of before again.
            UnsupportedOperationError: Others would become active within a call of another thread or task.
        """
        call = self._call()
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if call is not None and call.claims.is_steered() and names != list(self.active_adapters):
            raise ConfigError(
                f"set_adapter({adapter_name!r}) within steering(): the multiplier is that of {self.active_adapters}. "
                "Leave the block first, or name the adapter with steering(model, multiplier, adapter_name)."
            )
        if call is not None and names != list(self.active_adapters):
            call.claims.require_free("multiplier")
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' `generate_batch`, which packs prompts into one row, so that all are steered alike.

        Raises:
            UnsupportedOperationError: `multipliers=` or `adapter_names=` is given.
        """
        given = [name for name in ("multipliers", "adapter_names") if kwargs.get(name) is not None]
        if given:
            raise UnsupportedOperationError(
                f"{given[0]}= cannot be used in generate_batch, which packs prompts into one row: use generate."
            )
        return cast(Any, self.model).generate_batch(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Generator[None]:
        """Implements `adapter_names`; PEFT enters this context around each forward and `generate`."""
        adapter_names = kwargs.get("adapter_names")
        # Asked first, because looking for the call visits all modules.
        if adapter_names is None or (call := self._call()) is None:
            yield
            return
        if self.training:
            raise ConfigError("adapter_names= cannot be used in training mode: call model.eval() first.")
        if isinstance(adapter_names, str):
            raise ConfigError(f"adapter_names={adapter_names!r}: must be a list with a name for each row.")
        unknown = sorted(set(adapter_names) - set(self.peft_config) - {"__base__"})
        if unknown:
            known = ", ".join(map(repr, [*self.peft_config, "__base__"]))
            raise ConfigError(f"adapter_names= names {unknown[0]!r}, but the model has {known}.")
        with call.routing(list(adapter_names)):
            yield

    def _call(self) -> Call | None:
        """The call that all steered layers share, also when another tuner attached the first of them."""
        layers = steered_layers(self.model)
        return layers[0].call if layers else None

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Adds an adapter whose codes combine those of others, scaled by their current multipliers.

        The new adapter steers with its own code, at multiplier 1, and cuts each feature once. That is not the sum of
        the shifts of several active adapters.

        Args:
            adapters: Names of the adapters.
            weights: A factor for each; negative ones subtract.
            adapter_name: Name of the new adapter, which is frozen, and not active until `set_adapter`.
            combination_type: "linear", "ties" or "magnitude_prune".
            density: Share of each code's non-zero entries that pruning keeps, in (0, 1].
            majority_sign_method: For "ties": elect by the "total" of the entries or by the "frequency" of their signs.

        Raises:
            ConfigError: A name is unknown or taken, or an argument has an invalid value.
            SAEMismatchError: The adapters steer other layers, with other SAEs, or at other positions.
        """
        if adapter_name in self.peft_config:
            raise ConfigError(f"adapter_name={adapter_name!r} is taken: choose another name.")
        unknown = [name for name in adapters if name not in self.peft_config]
        if unknown or not adapters:
            raise ConfigError(f"adapters={adapters}: choose some of {', '.join(map(repr, self.peft_config))}.")
        configs = [cast(YaPOConfig, self.peft_config[name]) for name in adapters]
        for name, config in zip(adapters, configs, strict=True):
            require_combinable(configs[0], config, f"{adapters[0]!r} and {name!r}")
        layers = [layer for layer in steered_layers(self.model) if adapters[0] in layer.yapo_code]
        codes = [[layer.effective_code(name) for name in adapters] for layer in layers]
        combined = [combine_codes(own, weights, combination_type, density, majority_sign_method) for own in codes]
        self.peft_config[adapter_name] = replace(configs[0], multiplier=1.0, damage=None, damage_of=None)
        self.inject_adapter(self.model, adapter_name)
        for layer, code in zip(layers, combined, strict=True):
            layer.yapo_code[adapter_name].data.copy_(code)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Folds adapters into biases of their layers if their shifts are constant.

        Args:
            adapter_names: The adapters; the active ones if None.
            safe_merge: Check that no bias becomes NaN or infinite.

        Raises:
            UnsupportedOperationError: The shift depends on the token, or the architecture has no bias for it.
        """
        merge_adapters(self.model, steered_layers(self.model), adapter_names, safe_merge, in_place=True)

    def unmerge_adapter(self) -> None:
        """Restores the biases that merging replaced."""
        for layer in steered_layers(self.model):
            layer.unmerge()

    def _unload_and_optionally_merge(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        layers = steered_layers(self.model)
        if merge:
            merge_adapters(self.model, layers, adapter_names, safe_merge, in_place=False)
            complete_biases(self.model, [layer.block for layer in layers if layer.merged])
        else:
            self.unmerge_adapter()
        call = self._call()
        if call is not None:
            call.remove()
        for layer in layers:
            layer.detach_from_block()
        for name, module in self._saved_modules().items():
            parent, _, child = name.rpartition(".")
            unloaded = module.unload_and_optionally_merge_module(
                merge=merge, safe_merge=safe_merge, adapter_names=adapter_names
            )
            setattr(self.model.get_submodule(parent), child, unloaded)
        if getattr(self.model, "peft_config", None) is self.peft_config:
            del self.model.peft_config
        return self.model

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return to_file(model, cast(YaPOConfig, config), adapter_name, selected)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        return from_file(model, cast(YaPOConfig, config), adapter_name, state_dict)
