"""Finds the steered layers and the adapters of a model, and writes their codes."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import ConfigError, UnsupportedOperationError
from .config import YaPOConfig
from .layer import YaPOLayer


def steered_layers(model: nn.Module) -> list[YaPOLayer]:
    """The steered layers of a model, from the bottom up."""
    found = [module for module in model.modules() if isinstance(module, YaPOLayer)]
    return sorted(found, key=lambda layer: layer.index)


def adapter_of(model: nn.Module, adapter_name: str | None) -> tuple[str, YaPOConfig, list[YaPOLayer]]:
    """Returns the name, the config and the layers, from the bottom up, of an adapter; the active one if None.

    Raises:
        ConfigError: The model has no such adapter.
    """
    configs = cast(dict[str, Any], getattr(model, "peft_config", {}))
    name = adapter_name if adapter_name is not None else getattr(model, "active_adapter", None)
    if adapter_name is None and not isinstance(name, str):  # a model of transformers
        name = next((layer.active_adapters[0] for layer in steered_layers(model) if layer.active_adapters), None)
    config = configs.get(name) if isinstance(name, str) else None
    if not isinstance(name, str) or not isinstance(config, YaPOConfig):
        known = ", ".join(repr(key) for key, value in configs.items() if isinstance(value, YaPOConfig)) or "none"
        raise ConfigError(f"adapter_name={name!r}: name a YaPO adapter of the model, which has {known}.")
    return name, config, [layer for layer in steered_layers(model) if name in layer.yapo_code]


def layers_of(model: nn.Module, adapter_name: str | None, space: str, method: str) -> tuple[str, list[YaPOLayer]]:
    """Returns the name and the layers of an adapter that a method can fit; the active one if None.

    Raises:
        ConfigError: The model has no such adapter, or it its space is not the one that the method needs.
    """
    name, config, layers = adapter_of(model, adapter_name)
    if config.space != space:
        raise ConfigError(
            f"{method} needs space={space!r}, but adapter {name!r} has space={config.space!r}: attach one "
            f"with YaPOConfig(space={space!r}, ...)."
        )
    return name, layers


def write_code(layer: YaPOLayer, adapter_name: str, code: Tensor) -> None:
    """Replaces the code of an adapter at a layer, in place.

    Raises:
        UnsupportedOperationError: The code is offloaded or sharded.
    """
    own = layer.yapo_code[adapter_name]
    if own.is_meta or isinstance(own, DTensor) or own.shape != code.shape:
        raise UnsupportedOperationError(
            f"The code of adapter {adapter_name!r} is offloaded or sharded: fit it before the model is, or load the "
            "saved adapter into a model in memory."
        )
    own.data.copy_(code)
