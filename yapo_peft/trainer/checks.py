"""Checks of the adapter that is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME
from torch import nn

from ..errors import ConfigError
from ..tuner import YaPOConfig, YaPOLayer
from ..tuner.adapters import steered_layers


def require_adapter(model: Any, peft_config: PeftConfig | None) -> None:
    """Raises unless there is a YaPO adapter to train.

    Raises:
        ConfigError: There is none, it is frozen, another method's adapter would train along, or `peft_config` is
            another method's.
    """
    if isinstance(model, nn.Module):
        _require_no_other(model)
    if peft_config is not None:
        if not isinstance(peft_config, YaPOConfig):
            raise ConfigError(f"peft_config is a {type(peft_config).__name__}: YaPOTrainer trains a YaPOConfig.")
        return
    layers = steered_layers(model) if isinstance(model, PeftModel) else []
    if not layers:
        raise ConfigError(
            "There is no YaPO adapter to train: give peft_config=YaPOConfig(...), or a PeftModel that has one."
        )
    if not any(_is_trainable(layer) for layer in layers):
        raise ConfigError(
            "The model's YaPO adapter is frozen: load it with is_trainable=True, or activate a trainable one."
        )


def require_same_adapters(model: nn.Module, folder: Path) -> None:
    """Raises unless the adapters of a checkpoint steer as those of the model do.

    Raises:
        AdapterFileError: A file is truncated.
        ConfigError: An adapter steers other tokens.
    """
    for name, config in cast(dict[str, Any], getattr(model, "peft_config", {})).items():
        place = folder if name == "default" else folder / name
        if not isinstance(config, YaPOConfig) or not (place / CONFIG_NAME).is_file():
            continue
        saved = cast(YaPOConfig, YaPOConfig.from_pretrained(str(place)))
        if saved.positions != config.positions:
            raise ConfigError(
                f"The checkpoint {str(folder)!r} was trained with positions={saved.positions!r}, and this run has "
                f"positions={config.positions!r}: give the same to go on from it."
            )


def _require_no_other(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer) or isinstance(module, YaPOLayer):
            continue
        if any(parameter.requires_grad for parameter in cast(nn.Module, module).parameters()):
            raise ConfigError(
                f"{name!r} ({type(module).__name__}) holds another method's trainable adapter, which would learn along "
                "with the code, in the reference too: freeze it with requires_grad_(False), or merge it first."
            )


def _is_trainable(layer: YaPOLayer) -> bool:
    return any(layer.yapo_code[name].requires_grad for name in layer.active_adapters if name in layer.yapo_code)
