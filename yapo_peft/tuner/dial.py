"""Dials adapters of other methods, to compare them with steering: a LoRA by its scale, others on or off."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from ..errors import ConfigError, UnsupportedOperationError
from ..steering.formula import Multiplier
from .adapters import steered_layers, steering


def is_other_method(model: nn.Module) -> bool:
    """Whether a model has adapters, and none of them is a YaPO adapter."""
    return isinstance(model, PeftModel) and not steered_layers(model)


@contextmanager
def dialled(model: nn.Module, multiplier: Multiplier, adapter_name: str | None = None) -> Generator[None]:
    """As `steering`; without a YaPO adapter, scales the active LoRA adapters, or turns those of other methods off.

    A LoRA at multiplier m adds m times its update to each weight.

    Args:
        model: A `PeftModel`.
        multiplier: As for `steering`, but one for all rows.
        adapter_name: As for `steering`; None for adapters of other methods, of which the active ones are dialled.

    Raises:
        ConfigError: The multiplier is neither 0 nor 1 and the adapters cannot be scaled, or they are merged or
            disabled, or as `steering`.
        UnsupportedOperationError: There is a multiplier for each row.
    """
    if not is_other_method(model):
        with steering(model, multiplier, adapter_name):
            yield
        return
    if adapter_name is not None or not isinstance(multiplier, int | float):
        raise UnsupportedOperationError(
            "Adapters of other methods are dialled together, with one multiplier for all rows: activate one with "
            "set_adapter, and use a measure of log-probabilities."
        )
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if any(layer.merged or layer.disable_adapters for layer in layers):
        raise ConfigError("The adapters are merged or disabled: call unmerge_adapter() or enable_adapter_layers().")
    if multiplier not in (0, 1) and (not layers or any(any(layer.use_dora.values()) for layer in layers)):
        raise ConfigError(f"multiplier={multiplier:g}: only a plain LoRA can be scaled; use 0 and 1.")
    if not layers:
        with cast(Any, model).disable_adapter() if multiplier == 0 else nullcontext():
            yield
        return
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            for name in set(layer.active_adapters) & set(layer.scaling):
                layer.scaling[name] *= multiplier
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)
