"""Fewer features after the fact."""

from __future__ import annotations

from torch import nn

from ..errors import ConfigError
from ..sae import FrozenSAE
from ..tuner.sparsity import keep_largest
from .adapters import layers_of, write


def prune(model: nn.Module, max_features: int, adapter_name: str | None = None) -> None:
    """Keeps the features of a sparse adapter that move activations the furthest, and sets the others to zero.

    Training towards a number of features (`YaPOTrainingConfig(max_features=...)`) keeps more of the effect.

    Args:
        model: A model with a sparse adapter.
        max_features: How many to keep, of all its blocks together.
        adapter_name: The adapter; the active one if None.

    Raises:
        ConfigError: There is no such adapter, it is dense, or `max_features` is not positive.
    """
    if max_features < 1:
        raise ConfigError(f"max_features={max_features}: keep one feature at least.")
    name, layers = layers_of(model, adapter_name, "sae", "Pruning")
    codes = [layer.code(name).detach() for layer in layers]
    saes = [sae for layer in layers if isinstance(sae := layer.yapo_sae[name], FrozenSAE)]
    for layer, code in zip(layers, keep_largest(codes, saes, max_features), strict=True):
        write(layer, name, code)
