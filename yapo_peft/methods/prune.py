"""Fewer features after the fact."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..sae import FrozenSAE
from ..steering.formula import vector_of
from ..steering.reach import keep_largest, reach
from ..tuner.adapters import layers_of, write_code


def prune(model: nn.Module, max_features: int, adapter_name: str | None = None, *, rescale: bool = False) -> None:
    """Keeps the features of a sparse adapter that move activations the furthest, and sets the others to zero.

    Fewer features do less at the same multiplier, and less damage; at equal damage most of the effect is left.

    Args:
        model: A model with a sparse adapter.
        max_features: How many to keep, of all its layers together.
        adapter_name: The adapter; the active one if None.
        rescale: Whether to stretch what is kept, so that multiplier 1 goes on to mean about the same: at each layer,
        the
            positive entries together move activations as far as before, and so do the negative ones at multiplier -1,
            if
            any of that sign are kept. Entries that nearly cancel are not stretched by more than pruning took away: the
            sum of all entries' reaches, by that of those that are kept.

    Raises:
        ConfigError: There is no such adapter, it is dense, or `max_features` is not positive.
    """
    if isinstance(max_features, bool) or not isinstance(max_features, int) or max_features < 1:
        raise ConfigError(f"max_features={max_features!r}: keep a whole number of features, one at least.")
    name, layers = layers_of(model, adapter_name, "sae", "Pruning")
    codes = [layer.code(name).detach() for layer in layers]
    saes = [sae for layer in layers if isinstance(sae := layer.yapo_sae[name], FrozenSAE)]
    pruned = keep_largest(codes, saes, max_features)
    if rescale:
        pruned = [_stretched(*parts) for parts in zip(pruned, codes, saes, strict=True)]
    for layer, code in zip(layers, pruned, strict=True):
        write_code(layer, name, code)


def _stretched(pruned: Tensor, code: Tensor, sae: FrozenSAE) -> Tensor:
    """A pruned code whose entries of either sign, together, are as long in the residual stream as the code's."""
    positive, negative = (_stretch(pruned * side, code * side, sae) for side in (code > 0, code < 0))
    return torch.where(pruned > 0, positive * pruned, negative * pruned)


def _stretch(pruned: Tensor, code: Tensor, sae: FrozenSAE) -> float:
    if not pruned.any():
        return 1.0
    most = float(reach(code, sae).sum() / reach(pruned, sae).sum())
    before, after = (float(vector_of(entries, sae).norm()) for entries in (code, pruned))
    return min(before / max(after, 1e-12), most)
