"""Contrastive activation addition: the mean difference of chosen and rejected answers' activations."""

from __future__ import annotations

from torch import nn

from ..tuner.adapters import layers_of, write_code
from .contrast import Contrast, statistics_at


def fit_caa(model: nn.Module, contrast: Contrast, adapter_name: str | None = None) -> None:
    """Gives a dense adapter the mean of `h(chosen) - h(rejected)`, at each of its layers.

    Args:
        model: A model with a dense adapter.
        contrast: What `measure_contrast` found.
        adapter_name: The adapter; the active one if None.

    Raises:
        ConfigError: There is no such adapter, it is not dense, or the contrast was measured at other layers.

    Source: arXiv 2312.06681, section 3.
    """
    name, layers = layers_of(model, adapter_name, "dense", "CAA")
    found = [statistics_at(contrast, layer) for layer in layers]
    for layer, (chosen, rejected) in zip(layers, found, strict=True):
        write_code(layer, name, (chosen.total - rejected.total) / contrast.pairs)
