"""Prunes a sparse code to its most important features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._utils import at_least
from ..sae import FrozenSAE
from ..steering.formula import vector_of
from ..steering.reach import keep_largest, reach
from ..tuner.adapters import layers_of, write_codes


def prune(model: nn.Module, max_features: int, adapter_name: str | None = None, *, rescale: bool = False) -> None:
    """Keeps the features of a sparse adapter that move activations the furthest, and sets the others to zero.

    At the same multiplier, a pruned adapter has less effect and does less damage; at equal damage, it retains most of
    the effect.

    Args:
        model: A model with a sparse adapter.
        max_features: Number of features to keep, over all layers.
        adapter_name: The adapter; the active one if None.
        rescale: Whether to scale up the remaining entries, so that multiplier 1 keeps its meaning. At each layer, the
            positive entries together then move activations as far as before, and so do the negative ones at multiplier
            -1, if any of that sign remain. The factor is at most the ratio of the summed reach of all entries to that
            of the remaining ones, because entries that nearly cancel would be scaled up too much otherwise.

    Raises:
        ConfigError: The adapter does not exist or is dense, or `max_features` is not positive.
    """
    at_least(1, max_features=max_features)
    name, layers = layers_of(model, adapter_name, "sae", "Pruning")
    codes = [layer.code(name).detach() for layer in layers]
    saes = [sae for layer in layers if isinstance(sae := layer.yapo_sae[name], FrozenSAE)]
    pruned = keep_largest(codes, saes, max_features)
    if rescale:
        pruned = [_rescaled(*parts) for parts in zip(pruned, codes, saes, strict=True)]
    write_codes(model, name, layers, pruned)


def _rescaled(pruned: Tensor, code: Tensor, sae: FrozenSAE) -> Tensor:
    """Scales the entries of either sign so that their vector has the norm it had before pruning."""
    positive, negative = (_factor(pruned * side, code * side, sae) for side in (code > 0, code < 0))
    return torch.where(pruned > 0, positive * pruned, negative * pruned)


def _factor(pruned: Tensor, code: Tensor, sae: FrozenSAE) -> float:
    if not pruned.any():
        return 1.0
    most = float(reach(code, sae).sum() / reach(pruned, sae).sum())
    before, after = (float(vector_of(entries, sae).norm()) for entries in (code, pruned))
    return min(before / max(after, 1e-12), most)
