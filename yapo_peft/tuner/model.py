"""The tuner: attaches steered layers to a model, and saves and loads their codes as indices and values."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from ..errors import ConfigError, SAEMismatchError, UnsupportedOperationError
from ..sae import FrozenSAE, load_sae
from .blocks import decoder_blocks, hidden_size, resolve_layers
from .codes_on_disk import pack_codes, unpack_codes
from .config import YaPOConfig
from .layer import MERGE_REFUSED, YaPOLayer
from .positions import TokenSelector
from .strength import mark_lowest, steered_layers


class YaPOModel(BaseTuner):
    """Wraps decoder blocks in `YaPOLayer`s. PEFT makes one; users call `peft.get_peft_model`."""

    prefix: str = "yapo_"
    tuner_layer_cls = YaPOLayer
    target_module_mapping: dict[str, list[str]] = {}

    def __init__(
        self, model: nn.Module, peft_config: PeftConfig | dict[str, PeftConfig], adapter_name: str, **kwargs: Any
    ) -> None:
        # PeftModel hands over a dict. A config alone comes from direct injection, and one for inference that already
        # knows its SAE from transformers' loader, which then matches tensors by name and knows nothing of packed codes.
        if isinstance(peft_config, YaPOConfig) and peft_config.inference_mode and peft_config.sae_identity:
            raise UnsupportedOperationError(
                "transformers' load_adapter (and AutoModelForCausalLM.from_pretrained on an adapter's folder) cannot "
                "read YaPO's sparse codes. Load the adapter with peft.PeftModel.from_pretrained(model, folder) or "
                "peft.AutoPeftModelForCausalLM.from_pretrained(folder)."
            )
        super().__init__(model, peft_config, adapter_name, **kwargs)

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        if "." in adapter_name or hasattr(nn.ParameterDict, adapter_name):
            raise ConfigError(
                f"adapter_name={adapter_name!r} cannot name a parameter: use no dots, and no name of a dict's methods."
            )

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        """Finds the blocks and loads the SAEs, before PEFT changes anything and outside its meta-device context."""
        config = cast(YaPOConfig, peft_config)
        name, blocks = decoder_blocks(self.model)
        layers = resolve_layers(config.layer_indices(), len(blocks))
        saes = [self._checked_sae(config, position, layer) for position, layer in enumerate(layers)]
        config.layers = layers
        config.target_modules = [f"{name}.{layer}" for layer in layers]
        config.sae_identity = [sae.identity.to_dict() for sae in saes]
        self._saes_to_attach = dict(zip(config.target_modules, zip(layers, saes, strict=True), strict=True))
        return config

    def _checked_sae(self, config: YaPOConfig, position: int, layer: int) -> FrozenSAE:
        sae = load_sae(**config.sae_source(position))
        width = hidden_size(self.model)
        if sae.identity.d_in != width:
            raise SAEMismatchError(
                f"The SAE for layer {layer} reads activations of width {sae.identity.d_in}, but the model's are "
                f"{width} wide: it was trained on another model."
            )
        if sae.block is not None and sae.block != layer:
            raise SAEMismatchError(
                f"The SAE for layer {layer} was trained on the output of block {sae.block} ({sae.hook_name!r}): use "
                f"layers=[{sae.block}], or the SAE of layer {layer}."
            )
        recorded = config.sae_identity[position] if config.sae_identity else {}
        if "d_sae" in recorded:
            sae.identity.require_same(recorded, f"layer {layer}")
        return sae

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
        index, sae = self._saes_to_attach[current_key]
        layer = target if isinstance(target, YaPOLayer) else YaPOLayer(target, index, self._selector())
        layer.update_layer(
            adapter_name,
            sae,
            multiplier=config.multiplier,
            positions=config.positions,
            init_weights=config.init_weights,
        )
        if adapter_name not in self.active_adapters:
            layer.yapo_code[adapter_name].requires_grad_(False)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _selector(self) -> TokenSelector:
        """One selector for all layers of the model, also when another tuner attached the first of them."""
        layers = steered_layers(self.model)
        return layers[0]._selector if layers else TokenSelector(self.model)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)
        if isinstance(child, YaPOLayer) and not isinstance(new_module, YaPOLayer):
            child.unhook()

    def inject_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As PEFT's; then lets each layer know whether it is the lowest."""
        super().inject_adapter(*args, **kwargs)
        self._saes_to_attach = {}
        mark_lowest(self.model)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's; then lets each layer know whether it is the lowest."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        mark_lowest(self.model)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's; then lets each layer know whether it is the lowest."""
        super().delete_adapter(adapter_name)
        mark_lowest(self.model)

    def _check_merge_allowed(self) -> None:
        raise UnsupportedOperationError(MERGE_REFUSED)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        layers = steered_layers(self.model)
        model = cast(nn.Module, super()._unload_and_optionally_merge(merge, *args, **kwargs))
        if layers:
            layers[0]._selector.remove()
        return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Generator[None]:
        """PEFT calls this around each forward; without it, `adapter_names` would be ignored in silence."""
        if kwargs.get("adapter_names") is not None:
            raise UnsupportedOperationError(
                "adapter_names= (another adapter for each row of a batch) is not supported by YaPO. Use one adapter "
                "per batch; strengths can differ by row: steering(model, multiplier=tensor_with_one_per_row)."
            )
        if _drafts_tokens(kwargs):
            layers = steered_layers(self.model)
            chosen = {layer.positions[name] for layer in layers for name in layer.steering_adapters} - {"all"}
            if chosen:
                raise UnsupportedOperationError(
                    "Assisted generation checks drafted tokens together with the prompt, where "
                    f"positions={min(chosen)!r} cannot tell them apart. Generate without an assistant, or use an "
                    "adapter with positions='all'."
                )
        yield

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
        return pack_codes(selected)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        widths = {
            layer.index: layer.yapo_code[adapter_name].numel()
            for layer in steered_layers(model)
            if adapter_name in layer.yapo_code
        }
        unpacked = unpack_codes(state_dict, widths)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, unpacked)


def _drafts_tokens(kwargs: dict[str, Any]) -> bool:
    """Whether a call of `generate` lets something draft tokens ahead of the model."""
    config = kwargs.get("generation_config")
    settings = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
    return any(kwargs.get(name) is not None or getattr(config, name, None) is not None for name in settings)
