"""The layers of an adapter that a method is to fill in."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import ConfigError, UnsupportedOperationError
from ..tuner import YaPOConfig, YaPOLayer
from ..tuner.multiplier import steered_layers
from .contrast import AnswerStatistics, Contrast


def adapter_of(model: nn.Module, adapter_name: str | None) -> tuple[str, YaPOConfig, list[YaPOLayer]]:
    """An adapter's name, the active one's if None, its config, and its layers from the bottom up.

    Raises:
        ConfigError: There is no such adapter.
    """
    configs = cast(dict[str, Any], getattr(model, "peft_config", {}))
    name = adapter_name if adapter_name is not None else getattr(model, "active_adapter", None)
    if adapter_name is None and not isinstance(name, str):  # a model of transformers
        name = next((layer.active_adapters[0] for layer in steered_layers(model) if layer.active_adapters), None)
    config = configs.get(name) if isinstance(name, str) else None
    if not isinstance(name, str) or not isinstance(config, YaPOConfig):
        known = ", ".join(repr(key) for key, value in configs.items() if isinstance(value, YaPOConfig)) or "none"
        raise ConfigError(f"adapter_name={name!r}: name a YaPO adapter of the model; there is {known}.")
    return name, config, [layer for layer in steered_layers(model) if name in layer.yapo_code]


def layers_of(model: nn.Module, adapter_name: str | None, space: str, method: str) -> tuple[str, list[YaPOLayer]]:
    """An adapter's name, the active one's if None, and its layers.

    Raises:
        ConfigError: There is no such adapter, or it steers in another space than the method gives codes of.
    """
    name, config, layers = adapter_of(model, adapter_name)
    if config.space != space:
        raise ConfigError(
            f"{method} gives codes of space={space!r}, and adapter {name!r} has space={config.space!r}: attach one "
            f"with YaPOConfig(space={space!r}, ...)."
        )
    return name, layers


def statistics_at(contrast: Contrast, layer: YaPOLayer) -> tuple[AnswerStatistics, AnswerStatistics]:
    """The statistics of chosen and rejected answers at a layer.

    Raises:
        ConfigError: They were measured on other layers.
    """
    if layer.index not in contrast.chosen:
        raise ConfigError(
            f"The contrast was measured at blocks {sorted(contrast.chosen)}, not at {layer.index}: call "
            "measure_contrast again, with this adapter in the model."
        )
    return contrast.chosen[layer.index], contrast.rejected[layer.index]


def write(layer: YaPOLayer, adapter_name: str, code: Tensor) -> None:
    """Gives an adapter a code, in place.

    Raises:
        UnsupportedOperationError: The model keeps its codes elsewhere, or in parts.
    """
    own = layer.yapo_code[adapter_name]
    if own.is_meta or isinstance(own, DTensor) or own.shape != code.shape:
        raise UnsupportedOperationError(
            f"The code of adapter {adapter_name!r} is offloaded or sharded: fit it before the model is, or load the "
            "saved adapter into a model in memory."
        )
    own.data.copy_(code)
