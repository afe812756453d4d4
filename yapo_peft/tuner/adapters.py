"""Finds the adapters of a model, and sets their codes and multipliers."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .._utils import as_rows, finite
from ..errors import ConfigError, UnsupportedOperationError
from ..sae import FrozenSAE
from ..steering.formula import Multiplier
from .config import YaPOConfig, digest_of
from .hooks import require_single_hooks, run_up_to
from .layer import YaPOLayer


def steered_layers(model: nn.Module) -> list[YaPOLayer]:
    """The steered layers of a model, from the bottom up."""
    found = [module for module in model.modules() if isinstance(module, YaPOLayer)]
    return sorted(found, key=lambda layer: layer.index)


def adapter_of(model: nn.Module, adapter_name: str | None) -> tuple[str, YaPOConfig, list[YaPOLayer]]:
    """Returns the name, the config and the layers, from the bottom up, of an adapter; the active one if None.

    Raises:
        ConfigError: The model has no such adapter, or several are active and none is named.
    """
    configs = cast(dict[str, Any], getattr(model, "peft_config", {}))
    name = adapter_name
    if name is None:
        # PEFT's own record of it does not follow the tuner's `set_adapter`.
        layers = steered_layers(model)
        active = {name for layer in layers for name in layer.active_adapters if name in layer.yapo_code}
        if len(active) > 1:
            raise ConfigError(f"The adapters {', '.join(sorted(active))} are active: give adapter_name, one of them.")
        name = next(iter(active), None)
    config = configs.get(name) if name is not None else None
    if name is None or not isinstance(config, YaPOConfig):
        known = ", ".join(repr(key) for key, value in configs.items() if isinstance(value, YaPOConfig)) or "none"
        raise ConfigError(f"adapter_name={name!r}: name a YaPO adapter of the model, which has {known}.")
    return name, config, [layer for layer in steered_layers(model) if name in layer.yapo_code]


def require_adding(config: YaPOConfig, name: str, method: str) -> None:
    """Raises `ConfigError` if an adapter holds features at values, where a method is for codes that are added."""
    if config.mode == "clamp":
        raise ConfigError(f"{method} needs mode='add', but adapter {name!r} has mode='clamp', whose codes are values.")


def layers_of(
    model: nn.Module, adapter_name: str | None, space: str, method: str, may_clamp: bool = False
) -> tuple[str, list[YaPOLayer]]:
    """Returns the name and the layers of an adapter that a method can fit; the active one if None.

    Raises:
        ConfigError: The model has no such adapter, or its space or mode is not the one that the method needs.
    """
    name, config, layers = adapter_of(model, adapter_name)
    if not may_clamp:
        require_adding(config, name, method)
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


def write_codes(model: nn.Module, adapter_name: str, layers: list[YaPOLayer], codes: Iterable[Tensor]) -> None:
    """Replaces the codes of an adapter by ones whose damage has not been measured.

    Raises:
        UnsupportedOperationError: A code is offloaded or sharded.
    """
    for layer, code in zip(layers, codes, strict=True):
        write_code(layer, adapter_name, code)
    cast(Any, model).peft_config[adapter_name].forget_damage()


def record_damage(
    model: nn.Module, adapter_name: str, layers: Iterable[YaPOLayer], damage: dict[str, float]
) -> dict[str, float]:
    """Records the damage of an adapter's codes in its config, and returns it."""
    config = cast(Any, model).peft_config[adapter_name]
    config.damage, config.damage_of = damage, digest_of(layer.code(adapter_name) for layer in layers)
    return damage


def one_sae(layer: YaPOLayer) -> FrozenSAE | None:
    """The SAE of a layer's active adapters; None if they are dense.

    Raises:
        UnsupportedOperationError: They have several.
    """
    found = [layer.yapo_sae[name] for name in layer.active_adapters if name in layer.yapo_sae]
    saes = {id(sae): sae for sae in found if sae is not None}
    if len(saes) > 1:
        raise UnsupportedOperationError(
            f"cache_activations=True stores the features of one SAE, but the active adapters of layer {layer.index} "
            "have several: activate one of them, or train without the cache."
        )
    return next(iter(saes.values()), None)


@contextmanager
def steering(
    model: nn.Module, multiplier: Multiplier | Sequence[float], adapter_name: str | None = None
) -> Generator[None]:
    """Steers with another multiplier within a `with` block, and restores the previous state afterwards.

    Contexts can be nested. Which parameters are trainable does not change. The multiplier is part of the model's state:
    threads and tasks that share a model cannot steer it at the same time, the second one gets an error. A thread that
    only calls the model is steered, because it may have been started to stream the answer: let it end within the block.
    Generators of one thread that yield within such blocks share its state: the block that was entered last decides.

    Args:
        model: A `PeftModel`, or a transformers model with a YaPO adapter.
        multiplier: 1 as trained, 0 off, negative for the opposite; or one per row of the batch, `(batch,)`.
        adapter_name: The adapter that steers within the block, instead of the active ones.

    Raises:
        ConfigError: The model has no such adapter, or the multiplier is not finite.
        UnsupportedOperationError: Another thread or task steers the model, or is within a call of it.
    """
    layers = _layers_with(model, adapter_name)
    multiplier = _checked(multiplier)
    if torch.is_grad_enabled():
        for layer in layers:
            require_single_hooks(layer.block)
    claims = layers[0].call.claims
    with claims.claim("multiplier") as claim:
        claim.before = [(layer, layer.active_adapters, dict(layer.multiplier)) for layer in layers]
        try:
            for layer in layers:
                if adapter_name is not None:
                    layer.activate([adapter_name])
                for name in layer.active_adapters:
                    if name in layer.multiplier:
                        layer.multiplier[name] = multiplier
            yield
        finally:
            later = claims.later(claim)
            if later is not None:
                # It was entered within this one and has not ended: it restores what was before both.
                later.before = claim.before
            else:
                _restore(claim.before)


def _restore(before: list[tuple[YaPOLayer, list[str], dict[str, Multiplier]]]) -> None:
    for layer, active, multipliers in before:
        layer.activate(active)
        layer.multiplier.update({name: value for name, value in multipliers.items() if name in layer.multiplier})


def set_multiplier(model: nn.Module, multiplier: Multiplier | Sequence[float], adapter_name: str | None = None) -> None:
    """Sets the multiplier of an adapter, active or not, until it is set again.

    Args:
        model: A `PeftModel`, or a transformers model with a YaPO adapter.
        multiplier: 1 as trained, 0 off, negative for the opposite; or one per row of the batch, `(batch,)`.
        adapter_name: Which adapter; None for the active ones.

    Raises:
        ConfigError: The model has no such adapter, or the multiplier is not finite.
        UnsupportedOperationError: Another thread or task steers the model, or is within a call of it.
    """
    layers = _layers_with(model, adapter_name)
    multiplier = _checked(multiplier)
    layers[0].call.claims.require_free("multiplier")
    for layer in layers:
        for name in [adapter_name] if adapter_name is not None else layer.active_adapters:
            if name in layer.multiplier:
                layer.multiplier[name] = multiplier


def require_enabled(model: nn.Module) -> None:
    """Checks that adapters are enabled: otherwise, measurements would be without steering at any multiplier.

    Raises:
        ConfigError: The adapters are disabled.
    """
    if any(layer.disable_adapters for layer in steered_layers(model)):
        raise ConfigError("The adapters are disabled: leave disable_adapter(), or call enable_adapter_layers().")


def _layers_with(model: nn.Module, adapter_name: str | None) -> list[YaPOLayer]:
    layers = steered_layers(model)
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} has no YaPO adapter: attach one with get_peft_model(model, YaPOConfig(...)), or "
            "load one with PeftModel.from_pretrained."
        )
    known = sorted({name for layer in layers for name in layer.yapo_code})
    if adapter_name is not None and adapter_name not in known:
        raise ConfigError(f"There is no YaPO adapter {adapter_name!r}; the model has {', '.join(map(repr, known))}.")
    if any(layer.merged for layer in layers):
        raise ConfigError("The multiplier of a merged adapter is fixed: call unmerge_adapter() first.")
    return layers


def _checked(multiplier: Multiplier | Sequence[float]) -> Multiplier:
    """Converts a multiplier to a float, or to a tensor with one per row."""
    if isinstance(multiplier, Tensor) and multiplier.dim() == 0:
        multiplier = float(multiplier)
    if isinstance(multiplier, Tensor) or (isinstance(multiplier, Sequence) and not isinstance(multiplier, str)):
        return cast(Tensor, as_rows(multiplier))
    finite(multiplier=multiplier)
    return float(multiplier)


@torch.no_grad()
def unsteered_outputs(model: nn.Module, layers: Iterable[YaPOLayer], inputs: dict[str, Tensor]) -> dict[int, Tensor]:
    """Returns the outputs of layers without steering, `(batch, seq, d_model)` by layer index.

    Layers above the highest of them do not run, unless accelerate offloads weights layer by layer.
    """
    with steering(model, 0.0):
        return run_up_to(model, {layer.index: layer.block for layer in layers}, inputs)
