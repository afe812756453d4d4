"""Combines the codes of several adapters on one SAE into one code."""

from __future__ import annotations

from typing import Literal, cast, get_args

import torch
from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge, prune
from torch import Tensor

from .._utils import choice, finite
from ..errors import ConfigError, SAEMismatchError
from .config import YaPOConfig

Combination = Literal["linear", "ties", "magnitude_prune"]
MajoritySign = Literal["total", "frequency"]


def combine_codes(
    codes: list[Tensor],
    weights: list[float],
    combination_type: str = "linear",
    density: float | None = None,
    majority_sign_method: str = "total",
) -> Tensor:
    """Combines codes of the same SAE.

    The result steers as one code, which cuts each feature once; that is not the sum of the codes' own shifts.

    Args:
        codes: The codes, `(d_sae,)` each.
        weights: A factor for each; negative ones subtract.
        combination_type: "linear" for the weighted sum; "magnitude_prune" for the weighted sum of the largest
            entries; "ties" to prune, elect a sign for each feature, and average the entries that have it.
        density: Share of each code's non-zero entries that pruning keeps, in (0, 1].
        majority_sign_method: Elect by the "total" of the entries or by the "frequency" of their signs.

    Returns:
        The combined code, `(d_sae,)`.

    Raises:
        ConfigError: An argument has an invalid value.

    Source: TIES, arXiv 2306.01708; a code's zero entries are left out of its density, since most are zero.
    """
    _check(len(codes), weights, combination_type, density, majority_sign_method)
    if density is not None and density < 1:
        codes = [_largest(code, density) for code in codes]
    weighted = torch.stack(codes) * torch.tensor(weights, dtype=codes[0].dtype, device=codes[0].device)[:, None]
    if combination_type != "ties":
        return weighted.sum(dim=0)
    signed = torch.stack(codes) * torch.tensor(weights, device=codes[0].device).sign()[:, None]
    majority = calculate_majority_sign_mask(signed, method=cast(MajoritySign, majority_sign_method))
    return disjoint_merge(weighted, majority)


def require_combinable(first: YaPOConfig, other: YaPOConfig, names: str) -> None:
    """Checks that the codes of two adapters can be combined.

    Raises:
        SAEMismatchError: The adapters differ in their layers, spaces, SAEs or positions, or hold features at values.
    """
    if "clamp" in (first.mode, other.mode):
        raise SAEMismatchError(f"{names}: with mode='clamp', codes are values, which do not add up: activate both.")
    if first.space != other.space:
        raise SAEMismatchError(f"{names} steer in space {first.space!r} and {other.space!r}, which do not add up.")
    if first.layers != other.layers:
        raise SAEMismatchError(f"{names} steer layers {first.layers} and {other.layers}: only the same ones combine.")
    hashes = [[identity["content_hash"] for identity in config.sae_identity or []] for config in (first, other)]
    if hashes[0] != hashes[1]:
        raise SAEMismatchError(f"{names} have codes of different SAEs, whose features are not the same.")
    if first.positions != other.positions:
        raise SAEMismatchError(
            f"{names} steer positions {first.positions!r} and {other.positions!r}: one code can only have one choice."
        )


def _largest(code: Tensor, density: float) -> Tensor:
    kept = code.clone()
    nonzero = code != 0
    kept[nonzero] = prune(code[nonzero], density, method="magnitude")
    return kept


def _check(
    count: int, weights: list[float], combination_type: str, density: float | None, majority_sign_method: str
) -> None:
    if len(weights) != count:
        raise ConfigError(f"weights={weights} has {len(weights)} values for {count} adapters: give one for each.")
    for weight in weights:
        finite(weights=weight)
    choice(get_args(Combination), combination_type=combination_type)
    choice(get_args(MajoritySign), majority_sign_method=majority_sign_method)
    if combination_type == "linear" and density is not None:
        raise ConfigError(f"density={density} has no meaning for 'linear': use 'magnitude_prune' or 'ties'.")
    if combination_type != "linear" and (density is None or not 0 < density <= 1):
        raise ConfigError(f"density={density}: {combination_type!r} needs a share of the entries, in (0, 1].")
