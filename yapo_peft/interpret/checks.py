"""Checks of arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .._utils import at_least, finite
from ..errors import ConfigError
from ..sae import FrozenSAE
from ..tuner import YaPOLayer


def require_multiplier(multiplier: float) -> None:
    """Raises `ConfigError` unless the multiplier is finite and not zero."""
    finite(multiplier=multiplier)
    if multiplier == 0:
        raise ConfigError("multiplier=0: an adapter has no effect at 0; pass another number.")


def sae_of(layer: YaPOLayer, adapter_name: str) -> FrozenSAE:
    """The SAE of an adapter at a layer. Raises `ConfigError` if the adapter is dense."""
    sae = layer.yapo_sae[adapter_name]
    if sae is None:
        raise ConfigError(f"Adapter {adapter_name!r} is dense and has no features: pass a sparse one.")
    return sae


def features_by_layer(
    features: Sequence[int] | Mapping[int, Sequence[int]], layers: list[YaPOLayer], adapter_name: str
) -> dict[int, list[int]]:
    """Returns the given features by layer index, without duplicates and without layers that have none.

    Args:
        features: Feature indices, if the adapter steers one layer; else a mapping from layer index to feature indices.
        layers: The adapter's layers.
        adapter_name: Name of the adapter.

    Raises:
        ConfigError: The adapter's SAEs have no such features.
    """
    if isinstance(features, str) or not isinstance(features, Sequence | Mapping):
        raise ConfigError(f"features={features!r}: must be a list of indices, or a dict of such lists by layer.")
    if not isinstance(features, Mapping):
        if len(layers) != 1:
            raise ConfigError(
                f"The adapter steers layers {[layer.index for layer in layers]}: pass features by layer, such as "
                f"{{{layers[0].index}: [...]}}."
            )
        features = {layers[0].index: features}
    by_index = {layer.index: layer for layer in layers}
    found: dict[int, list[int]] = {}
    for index, chosen in features.items():
        if index not in by_index:
            raise ConfigError(
                f"Features of layer {index}: the adapter steers layers {sorted(by_index)}; use one of them."
            )
        sae = sae_of(by_index[index], adapter_name)
        if isinstance(chosen, str) or not isinstance(chosen, Sequence):
            raise ConfigError(f"features={{{index}: {chosen!r}}}: must be a list of indices.")
        for feature in chosen:
            at_least(0, feature=feature)
        outside = [feature for feature in chosen if feature >= sae.identity.d_sae]
        if outside:
            raise ConfigError(f"Feature {outside[0]} of layer {index}: must be below d_sae={sae.identity.d_sae}.")
        found[index] = list(dict.fromkeys(int(feature) for feature in chosen))
    return {index: found[index] for index in sorted(found) if found[index]}
