"""Contrastive activation addition (CAA): the mean difference between chosen and rejected activations."""

from __future__ import annotations

from torch import nn

from ..tuner.adapters import layers_of, write_codes
from .contrast import Contrast, statistics_at


def fit_caa(model: nn.Module, contrast: Contrast, adapter_name: str | None = None) -> None:
    """Sets a dense adapter's vector to the mean of `h(chosen) - h(rejected)`, at each of its layers.

    Args:
        model: A model with a dense adapter.
        contrast: The result of `measure_contrast`.
        adapter_name: The adapter; the active one if None.

    Raises:
        ConfigError: The adapter does not exist, is not dense, or steers layers that the contrast does not cover.

    Source: arXiv 2312.06681, section 3.
    """
    name, layers = layers_of(model, adapter_name, "dense", "CAA")
    found = [statistics_at(contrast, layer) for layer in layers]
    vectors = [(chosen.total - rejected.total) / contrast.pairs for chosen, rejected in found]
    write_codes(model, name, layers, vectors)
