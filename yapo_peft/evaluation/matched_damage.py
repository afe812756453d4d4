"""Compares methods at the same damage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from ..errors import ConfigError
from .scores import SEED, Scores

# Damage that is 0 without steering and grows with the square of small multipliers.
_QUADRATIC = ("kl",)


def at_matched_damage(
    effect: Scores,
    damage: Scores,
    levels: Sequence[float],
    *,
    metric: str,
    damage_metric: str = "kl",
    negative: bool = False,
    **bootstrap: Any,
) -> pd.DataFrame:
    """The effect of each method at the multiplier that causes a given damage.

    Multipliers of different methods are not comparable: a vector twice as long is as strong at half the multiplier. So
    along each method's multipliers, from 0 outwards, damage is interpolated to find the multiplier of each level, and
    the effect is interpolated there. The KL grows with the square of a small multiplier, so it is interpolated along
    its square root; other damage along a line.

    Args:
        effect: Scores with labels such as "method", over multipliers that both have.
        damage: Scores of `Damage` with the same labels.
        levels: Levels of damage, such as KL of 0.05, 0.1, 0.2 nats.
        metric: Metric of `effect`.
        damage_metric: Metric of `damage` that grows with the multiplier.
        negative: Along negative multipliers instead of positive ones.
        **bootstrap: For `Scores.summary`.

    Returns:
        A row per level and labels: `multiplier`, `metric`, and the interval's ends interpolated in the same way; NaN
        where the largest multiplier does less damage than that.

    Raises:
        ConfigError: Labels differ, there is no such metric or level, or there are no multipliers on that side of 0.
    """
    for scores, name in ((effect, metric), (damage, damage_metric)):
        if name not in scores.metrics:
            raise ConfigError(f"There is no metric {name!r}; the scores have {', '.join(map(repr, scores.metrics))}.")
    if damage_metric in _QUADRATIC and min(levels, default=0) < 0:
        raise ConfigError(f"levels={list(levels)}: {damage_metric} is nowhere negative.")
    keys = [name for name in effect.labels if name != SEED]
    if set(keys) != {name for name in damage.labels if name != SEED}:
        raise ConfigError(
            f"effect has the labels {effect.labels}, damage has {damage.labels}: give both the same ones."
        )
    effects, damages = effect.summary(**bootstrap), damage.summary(**bootstrap)
    found: list[dict[str, Any]] = []
    columns = ["multiplier", metric, f"{metric}_low", f"{metric}_high"]
    damages = damages[[*keys, "multiplier", damage_metric]]
    groups: Any = effects.groupby(keys, sort=False, dropna=False) if keys else [((), effects)]
    for values, group in groups:
        labels = dict(zip(keys, values, strict=True))
        both = group[[*keys, *columns]].merge(damages, on=[*keys, "multiplier"])
        side = both[both["multiplier"] <= 0] if negative else both[both["multiplier"] >= 0]
        side = side.sort_values("multiplier", ascending=not negative)
        if len(side) < 2:
            sign = "<= 0" if negative else ">= 0"
            raise ConfigError(
                f"{labels or 'The scores'}: effect and damage have {len(side)} multipliers {sign} in common: measure "
                "both at two or more."
            )
        side = side.dropna(subset=[*columns, damage_metric])
        for level in levels:
            found.append({**labels, damage_metric: level, **_at(level, side, damage_metric, columns)})
    return pd.DataFrame(found)


def _at(level: float, side: pd.DataFrame, damage_metric: str, columns: list[str]) -> dict[str, float]:
    """The columns where the damage first reaches a level, between two multipliers; NaN if it never does."""
    damage = side[damage_metric].to_numpy(dtype=float)
    if damage_metric in _QUADRATIC:
        level, damage = level**0.5, damage.clip(0) ** 0.5
    reaches = np.flatnonzero(damage >= level)
    if not len(reaches) or (reaches[0] == 0 and damage[0] > level):
        return dict.fromkeys(columns, float("nan"))
    end = int(reaches[0])
    start = max(end - 1, 0)
    share = (level - damage[start]) / (damage[end] - damage[start]) if end > start else 0.0
    values = side[columns].to_numpy(dtype=float)
    return dict(zip(columns, (values[start] + share * (values[end] - values[start])).tolist(), strict=True))
