"""Sparse activation steering (SAS): the features that distinguish chosen from rejected answers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..tuner.adapters import layers_of, write_codes
from .contrast import Contrast, FeatureStatistics, statistics_at


def fit_sas(model: nn.Module, contrast: Contrast, adapter_name: str | None = None, *, tau: float = 0.7) -> None:
    """Sets a sparse adapter's code to the mean features of chosen answers minus those of rejected ones.

    Features are kept if they are active in at least a fraction `tau` of the chosen answers, or of the rejected ones,
    but not of both. Each mean is taken over the answers in which the feature is active.

    Args:
        model: A model with a sparse adapter.
        contrast: The result of `measure_contrast`.
        adapter_name: The adapter; the active one if None.
        tau: Fraction of the answers in which a feature must be active, in [0, 1].

    Raises:
        ConfigError: The adapter does not exist or is dense, the contrast does not cover its layers or SAEs, `tau` is
            out of range, or no feature remains.

    Source: arXiv 2503.00177, the six steps of its figure 1.
    """
    if not 0 <= tau <= 1:
        raise ConfigError(f"tau={tau!r}: must be a fraction of the answers, between 0 and 1.")
    name, layers = layers_of(model, adapter_name, "sae", "SAS")
    codes = []
    for layer in layers:
        sae = layer.yapo_sae[name]
        assert sae is not None
        kinds = [kind.features.get(sae.identity.content_hash) for kind in statistics_at(contrast, layer)]
        if kinds[0] is None or kinds[1] is None:
            raise ConfigError(
                f"The contrast does not cover the SAE of adapter {name!r} at layer {layer.index}: call "
                "measure_contrast again after adding the adapter."
            )
        code = sas_code(kinds[0], kinds[1], contrast.pairs, tau)
        if not code.any():
            raise ConfigError(
                f"tau={tau}: no feature of layer {layer.index} is active in that fraction of the chosen answers or of "
                "the rejected ones, but not of both; lower tau if features are rare, raise it if most are shared."
            )
        codes.append(code)
    write_codes(model, name, layers, codes)


def sas_code(chosen: FeatureStatistics, rejected: FeatureStatistics, pairs: int, tau: float) -> Tensor:
    """The code of `fit_sas`, `(d_sae,)`."""
    kept = [(kind.active >= max(tau * pairs, 1)) for kind in (chosen, rejected)]
    means = [
        torch.where(keep, kind.total / kind.active.clamp(min=1), 0.0)
        for keep, kind in zip(kept, (chosen, rejected), strict=True)
    ]
    return (means[0] - means[1]).masked_fill(kept[0] & kept[1], 0)
