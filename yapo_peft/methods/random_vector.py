"""Random vectors, a control for the effect of any vector of the same norm."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import ConfigError
from ..steering.formula import vector_of
from ..tuner import YaPOLayer
from ..tuner.adapters import adapter_of, layers_of, require_adding, write_codes


def fit_random(model: nn.Module, like: str, adapter_name: str | None = None, *, seed: int = 0) -> None:
    """Sets a dense adapter's vectors to random directions, with the norms of another adapter's at the same layers.

    For a sparse adapter, that is the norm of its shift at multiplier 1 if no feature is clipped.

    Args:
        model: A model with both adapters.
        like: The adapter whose norms to match.
        adapter_name: The adapter to set; the active one if None.
        seed: Seed of the directions.

    Raises:
        ConfigError: The adapter does not exist or is not dense; or `like` is missing at one of its layers, has a zero
            code, or has an SAE that scales its output token by token.
    """
    name, layers = layers_of(model, adapter_name, "dense", "A random vector")
    generator = torch.Generator().manual_seed(seed)
    missing = [layer.index for layer in layers if like not in layer.yapo_code]
    if missing:
        raise ConfigError(
            f"like={like!r}: no such adapter at layer {missing[0]}, which {name!r} steers; name one that steers all of "
            "its layers."
        )
    require_adding(adapter_of(model, like)[1], like, "A random vector of its norm")
    norms = [_shift_norm(layer, like) for layer in layers]
    directions = [torch.randn(len(layer.yapo_code[name]), generator=generator) for layer in layers]
    lengths = zip(directions, norms, strict=True)
    write_codes(model, name, layers, [direction * (norm / direction.norm()) for direction, norm in lengths])


def _shift_norm(layer: YaPOLayer, adapter_name: str) -> float:
    code, sae = layer.code(adapter_name).detach(), layer.yapo_sae[adapter_name]
    if sae is not None and sae.normalization != "none":
        raise ConfigError(
            f"like={adapter_name!r}: its SAE scales the shift token by token (normalization={sae.normalization!r}), so "
            "there is no single norm to match; name a dense adapter."
        )
    if not code.any():
        raise ConfigError(f"like={adapter_name!r}: its code at layer {layer.index} is zero; fit or train it first.")
    return float(vector_of(code, sae).norm())
