"""Sparse activation steering: the difference of features that tell chosen from rejected answers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..tuner.adapters import layers_of, write_code
from .contrast import Contrast, FeatureStatistics, statistics_at


def fit_sas(model: nn.Module, contrast: Contrast, adapter_name: str | None = None, *, tau: float = 0.7) -> None:
    """Gives a sparse adapter the mean features of chosen answers minus those of rejected ones, without shared ones.

    Of the answers of each kind, a feature counts if it is on in a share of at least `tau`; its value is the mean over
    the answers in which it is on. Features that count on both sides are left out.

    Args:
        model: A model with a sparse adapter.
        contrast: What `measure_contrast` found.
        adapter_name: The adapter; the active one if None.
        tau: Share of the answers in which a feature must be on, in [0, 1].

    Raises:
        ConfigError: There is no such adapter, it is dense, the contrast was measured at other layers or with other
            SAEs, `tau` is out of range, or no feature is left.

    Source: arXiv 2503.00177, the six steps of its figure 1.
    """
    if not 0 <= tau <= 1:
        raise ConfigError(f"tau={tau}: give a share of the answers, between 0 and 1.")
    name, layers = layers_of(model, adapter_name, "sae", "SAS")
    codes = []
    for layer in layers:
        sae = layer.yapo_sae[name]
        assert sae is not None
        kinds = [kind.features.get(sae.identity.content_hash) for kind in statistics_at(contrast, layer)]
        if kinds[0] is None or kinds[1] is None:
            raise ConfigError(
                f"The contrast was measured without the SAE of adapter {name!r} at layer {layer.index}: call "
                "measure_contrast again, with this adapter in the model."
            )
        code = sas_code(kinds[0], kinds[1], contrast.pairs, tau)
        if not code.any():
            raise ConfigError(
                f"tau={tau} leaves no feature of layer {layer.index} that is often on in one kind of answer and not in "
                "the other: lower it if features are rare, raise it if most are on in both."
            )
        codes.append(code)
    for layer, code in zip(layers, codes, strict=True):
        write_code(layer, name, code)


def sas_code(chosen: FeatureStatistics, rejected: FeatureStatistics, pairs: int, tau: float) -> Tensor:
    """The code of `fit_sas`, `(d_sae,)`."""
    kept = [(kind.active >= max(tau * pairs, 1)) for kind in (chosen, rejected)]
    means = [
        torch.where(keep, kind.total / kind.active.clamp(min=1), 0.0)
        for keep, kind in zip(kept, (chosen, rejected), strict=True)
    ]
    return (means[0] - means[1]).masked_fill(kept[0] & kept[1], 0)
