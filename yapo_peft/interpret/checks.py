"""What users hand in, checked before any work."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from ..errors import ConfigError
from ..tuner import YaPOLayer


def require_counts(least: int = 1, **values: Any) -> None:
    """Raises unless all values are whole numbers, `least` or more.

    Raises:
        ConfigError: One is not; the message names it.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
            raise ConfigError(f"{name}={value!r}: give a whole number of {least} or more.")


def require_multiplier(multiplier: Any) -> None:
    """Raises unless an adapter does something at a multiplier.

    Raises:
        ConfigError: It is zero, not finite, or no number.
    """
    if isinstance(multiplier, bool) or not isinstance(multiplier, Real) or not math.isfinite(multiplier):
        raise ConfigError(f"multiplier={multiplier!r}: give a finite number.")
    if multiplier == 0:
        raise ConfigError("multiplier=0: an adapter does nothing there; give another number.")


def features_by_layer(
    features: Sequence[int] | Mapping[int, Sequence[int]], layers: list[YaPOLayer], adapter_name: str
) -> dict[int, list[int]]:
    """Features as users name them, by the index of their block, each once, without blocks that have none.

    Args:
        features: Indices, of an adapter of one block; or for each block's index those of its SAE.
        layers: The adapter's layers.
        adapter_name: Its name.

    Raises:
        ConfigError: They are none of the adapter's SAEs.
    """
    if isinstance(features, str) or not isinstance(features, Sequence | Mapping):
        raise ConfigError(f"features={features!r}: give a list of indices, or one for each block's index.")
    if not isinstance(features, Mapping):
        if len(layers) != 1:
            raise ConfigError(
                f"The adapter steers blocks {[layer.index for layer in layers]}: give features by block, as "
                f"{{{layers[0].index}: [...]}}."
            )
        features = {layers[0].index: features}
    by_index = {layer.index: layer for layer in layers}
    found: dict[int, list[int]] = {}
    for index, chosen in features.items():
        if index not in by_index:
            raise ConfigError(f"features= names block {index}, and the adapter steers {sorted(by_index)}.")
        sae = by_index[index].yapo_sae[adapter_name]
        if sae is None:
            raise ConfigError(f"Adapter {adapter_name!r} is dense, and has no features: give a sparse one.")
        if isinstance(chosen, str) or not isinstance(chosen, Sequence):
            raise ConfigError(f"features={{{index}: {chosen!r}}}: give a list of indices.")
        for feature in chosen:
            require_counts(0, feature=feature)
        outside = [feature for feature in chosen if feature >= sae.identity.d_sae]
        if outside:
            raise ConfigError(f"Feature {outside[0]} is none of the {sae.identity.d_sae} of block {index}'s SAE.")
        found[index] = list(dict.fromkeys(int(feature) for feature in chosen))
    return {index: found[index] for index in sorted(found) if found[index]}
