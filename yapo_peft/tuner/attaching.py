"""Prepares a config for a model: resolves its layers, loads its SAEs, and checks that they fit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

from peft import PeftConfig, TaskType
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from ..errors import ConfigError, SAEMismatchError, UnsupportedOperationError
from ..sae import FrozenSAE
from .blocks import CHILD_NAME, decoder_blocks, hidden_size, resolve_layers
from .config import YaPOConfig


def require_adapter_name(model: nn.Module, adapter_name: str, blocks: str | None) -> None:
    """Checks a name by which PEFT has to tell the parameters of an adapter from others.

    Raises:
        ConfigError: PEFT would confuse it with other names.
    """
    parts = {"base_model", "model", *decoder_blocks(model, blocks)[0].split("."), CHILD_NAME, "yapo_code", "__base__"}
    if "." in adapter_name or adapter_name.isdigit() or adapter_name in parts or hasattr(dict, adapter_name):
        raise ConfigError(
            f"adapter_name={adapter_name!r} cannot name an adapter: use no dots, no number, no name of a dict's "
            f"methods, and none of {', '.join(sorted(parts))}."
        )


def require_head(model: nn.Module, config: PeftConfig) -> None:
    """Raises `ConfigError` if a model cannot generate, as its task says; PEFT fails on this later, less clearly."""
    if config.task_type == TaskType.CAUSAL_LM and not hasattr(model, "prepare_inputs_for_generation"):
        raise ConfigError(
            f"task_type='CAUSAL_LM', YaPOConfig's default, does not fit {type(model).__name__}, which cannot generate: "
            "give task_type='FEATURE_EXTRACTION', or 'SEQ_CLS' for a classifier."
        )


def adapter_name_of(source: str, model: nn.Module) -> str:
    """A name for the adapter of a folder or a Hub repository in a model: the folder's, if PEFT takes it."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(source).name).strip("-") or "adapter"
    config = YaPOConfig.from_pretrained(source)
    try:
        require_adapter_name(model, name, getattr(config, "blocks", None))
    except ConfigError:
        return f"adapter-{name}"
    return name


def keep_backward(model: nn.Module) -> None:
    """Keeps bitsandbytes from packing 4-bit weights for a kernel of some CPUs that has no backward pass.

    It packs them in the first forward pass in evaluation mode, and gradients through them are wrong from then on.

    Raises:
        UnsupportedOperationError: They are packed already.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise UnsupportedOperationError(
                f"bitsandbytes has packed the 4-bit weights of {name!r} for a kernel without a backward pass, when the "
                "model ran in evaluation mode: load the model again, and attach the adapter before it runs."
            )
        module.support_avx512bf16_for_cpu = cast(Any, False)


def resolve(model: nn.Module, config: YaPOConfig) -> dict[int, FrozenSAE | None]:
    """Fills in the layers, target modules and SAE identities of a config, and returns the SAE of each layer.

    Raises:
        ConfigError: The config does not fit the model.
        SAEMismatchError: An SAE was trained on another model or layer, or is not the one that the config records.
        UnsupportedOperationError: The architecture cannot be steered.
    """
    own: Any = getattr(model, "config", None)
    if getattr(own, "model_type", None) == "xlnet":
        raise UnsupportedOperationError("XLNet cannot be steered: its layers put the sequence before the batch.")
    if getattr(own, "is_encoder_decoder", False) and config.positions != "all":
        raise ConfigError(
            f"positions={config.positions!r} expects answers behind their prompts, but {type(model).__name__} is an "
            "encoder-decoder: use positions='all'."
        )
    is_of_transformers = type(model).__module__.startswith("transformers.models.")
    if config.task_type == TaskType.CAUSAL_LM and is_of_transformers and type(own) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        # Of vision wrappers, cards name the class to load, which AutoModelForCausalLM does not find.
        config.auto_mapping = {"base_model_class": type(model).__name__, "parent_library": "transformers"}
    name, blocks = decoder_blocks(model, config.blocks)
    layers = resolve_layers(config.layer_indices(), len(blocks))
    is_dense = config.space == "dense"
    saes = {layer: None if is_dense else _sae(model, config, place, layer) for place, layer in enumerate(layers)}
    config.layers = layers
    config.target_modules = [f"{name}.{layer}" for layer in layers]
    config.sae_identity = [sae.identity.to_dict() for sae in saes.values() if sae is not None] or None
    return saes


def _sae(model: nn.Module, config: YaPOConfig, position: int, layer: int) -> FrozenSAE:
    recorded, sae, width = config.recorded_sae(position), config.load_sae(position), hidden_size(model)
    if sae.identity.d_in != width:
        raise SAEMismatchError(
            f"The SAE for layer {layer} reads activations of width {sae.identity.d_in}, but the model's are {width} "
            "wide: it was trained on another model."
        )
    if sae.block == -1:
        raise SAEMismatchError(
            f"The SAE for layer {layer} was trained on {sae.hook_name!r}, the embeddings, which no layer outputs: use "
            "an SAE of a layer's output."
        )
    if sae.block is not None and sae.block != layer:
        raise SAEMismatchError(
            f"The SAE for layer {layer} was trained on the output of layer {sae.block} ({sae.hook_name!r}): use "
            f"layers=[{sae.block}], or the SAE of layer {layer}."
        )
    if "d_sae" in recorded:
        sae.identity.require_same(recorded, f"layer {layer}")
    return sae
