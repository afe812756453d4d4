"""A random vector, as a control for what any vector of that length does."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import ConfigError
from ..steering.formula import vector_of
from ..tuner import YaPOLayer
from ..tuner.adapters import layers_of, write_code


def fit_random(model: nn.Module, like: str, adapter_name: str | None = None, *, seed: int = 0) -> None:
    """Gives a dense adapter random directions, as long as another adapter's shift at the same layers.

    Of a sparse adapter, that is the shift of its code at multiplier 1, were no feature cut.

    Args:
        model: A model with both adapters.
        like: The adapter whose length is taken.
        adapter_name: The adapter that gets the directions; the active one if None.
        seed: Of the directions.

    Raises:
        ConfigError: There is no such adapter, it is not dense, or the other one steers other layers, is zero, or has an
            SAE that scales each token by itself, so that its shift has no one length.
    """
    name, layers = layers_of(model, adapter_name, "dense", "A random vector")
    generator = torch.Generator().manual_seed(seed)
    missing = [layer.index for layer in layers if like not in layer.yapo_code]
    if missing:
        raise ConfigError(f"like={like!r} names no adapter at layer {missing[0]}, which {name!r} steers.")
    lengths = [_length_of_shift(layer, like) for layer in layers]
    for layer, length in zip(layers, lengths, strict=True):
        direction = torch.randn(len(layer.yapo_code[name]), generator=generator)
        write_code(layer, name, direction * (length / direction.norm()))


def _length_of_shift(layer: YaPOLayer, adapter_name: str) -> float:
    code, sae = layer.code(adapter_name).detach(), layer.yapo_sae[adapter_name]
    if sae is not None and sae.normalization != "none":
        raise ConfigError(
            f"like={adapter_name!r} has an SAE that scales each token by itself ({sae.normalization!r}): its shift "
            "has no one length. Take a dense adapter."
        )
    if not code.any():
        raise ConfigError(f"like={adapter_name!r} has a zero code at layer {layer.index}: fit or train it first.")
    return float(vector_of(code, sae).norm())
