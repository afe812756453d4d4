"""Steers chosen features, without data."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral

import torch
from torch import nn

from .._utils import is_finite
from ..errors import ConfigError
from ..tuner.adapters import layers_of, write_codes

# The entry of a feature that is held at 0.
_OFF = -torch.finfo(torch.float32).tiny


def set_features(
    model: nn.Module, features: Mapping[int, Mapping[int, float | None]], adapter_name: str | None = None
) -> None:
    """Sets entries of a sparse adapter's code by hand; others keep their values, which are 0 in a new adapter.

    Args:
        model: A model with a sparse adapter.
        features: For each layer, the index of each feature and how much multiplier 1 adds to its activation, in the
            SAE's units; below 0 it lowers the feature where it is active, and 0 leaves it alone. With `mode="clamp"`,
            the activation to hold it at, and 0 turns it off. None removes the feature.
        adapter_name: The adapter; the active one if None.

    Raises:
        ConfigError: The adapter does not exist, is dense or does not steer a layer, its SAE has no such feature, or
            a value is not finite, or below 0 with `mode="clamp"`. Nothing is changed.
    """
    name, layers = layers_of(model, adapter_name, "sae", "Setting features", may_clamp=True)
    clamps = layers[0].clamps[name]
    codes = {layer.index: layer.code(name).detach().clone() for layer in layers}
    if not isinstance(features, Mapping) or not all(isinstance(entries, Mapping) for entries in features.values()):
        raise ConfigError(f"features={features!r}: must be a mapping for each layer, such as {{14: {{1965: 8.0}}}}.")
    for index, entries in features.items():
        if index not in codes:
            raise ConfigError(f"Adapter {name!r} steers layers {', '.join(map(str, codes))}, not {index}.")
        for feature, value in entries.items():
            if not isinstance(feature, Integral) or not 0 <= feature < len(codes[index]):
                raise ConfigError(f"Feature {feature!r} of layer {index}: its SAE has {len(codes[index])}, from 0 on.")
            codes[index][feature] = entry_of(value, f"Feature {feature} of layer {index}", clamps)
    write_codes(model, name, layers, codes.values())


def entry_of(value: float | None, feature: str, clamps: bool) -> float:
    """Converts a value of `set_features` to the code's entry, and raises as it does; None removes the entry."""
    if value is None:
        return 0.0
    if not is_finite(value):
        raise ConfigError(f"{feature} is set to {value}: must be a finite number.")
    if clamps and value < 0:
        raise ConfigError(f"{feature} cannot be held at {value}: must be 0 or more.")
    # An entry of 0 is no part of a code, and one below is held at 0.
    return value or (_OFF if clamps else 0.0)
