"""Compares methods at the same damage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from ..errors import ConfigError
from .scores import SEED, Scores

# Damage that is 0 without steering and grows with the square of small multipliers.
_QUADRATIC = ("kl",)
# How far a metric is above that of the reference.
DIFFERENCE = "difference"


def at_matched_damage(
    effect: Scores,
    damage: Scores,
    levels: Sequence[float],
    *,
    metric: str,
    damage_metric: str = "kl",
    negative: bool = False,
    reference: Mapping[str, Any] | None = None,
    **bootstrap: Any,
) -> pd.DataFrame:
    """The effect of each method at the multiplier that causes a given damage.

    Multipliers of different methods are not comparable: a vector twice as long is as strong at half the multiplier. So
    along each method's multipliers, from 0 outwards, damage is interpolated to find the multiplier of each level, and
    the effect on each example is interpolated there. The KL grows with the square of a small multiplier, so it is
    interpolated along its square root; other damage along a line.

    Args:
        effect: Scores with labels such as "method", over multipliers that both have.
        damage: Scores of `Damage` with the same labels.
        levels: Levels of damage, such as KL of 0.05, 0.1, 0.2 nats.
        metric: Metric of `effect`.
        damage_metric: Metric of `damage` that grows with the multiplier.
        negative: Along negative multipliers instead of positive ones.
        reference: Labels of the method to subtract, such as `{"method": "BiPO"}`: adds the column `difference`, whose
            interval is of paired examples, and so narrower than those of both methods.
        **bootstrap: For `Scores.summary`.

    Returns:
        A row per level and labels: `multiplier`, `metric`, and the bounds of its interval; NaN where the largest
        multiplier does less damage than that. With `reference`, also `difference` and its bounds.

    Raises:
        ConfigError: Labels differ, there is no such metric, level or reference, or there are no multipliers on that
            side of 0.
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
    if reference is not None and (not reference or not set(reference) <= set(keys)):
        raise ConfigError(f"reference={dict(reference)}: must give labels of the scores, which are {keys}.")
    harm: Any = damage.table.groupby([*keys, "multiplier"], dropna=False, as_index=False)[damage_metric].mean()
    index = [name for name in (SEED, "example") if name in effect.table]
    parts: list[Any] = []
    groups: Any = effect.table.groupby(keys, sort=False, dropna=False) if keys else [((), effect.table)]
    for values, rows in groups:
        labels = dict(zip(keys, values, strict=True))
        by_multiplier: Any = rows.set_index([*index, "multiplier"])[metric].unstack()
        both: Any = pd.DataFrame({"multiplier": by_multiplier.columns}).assign(**labels).merge(harm)
        side = both[both["multiplier"] <= 0] if negative else both[both["multiplier"] >= 0]
        side = side[["multiplier", damage_metric]].sort_values("multiplier")
        if len(side) < 2:
            sign = "<= 0" if negative else ">= 0"
            raise ConfigError(
                f"{labels or 'The scores'}: effect and damage have {len(side)} multipliers {sign} in common: measure "
                "both at two or more."
            )
        for level in levels:
            multiplier = _multiplier_at(level, side, damage_metric)
            at: Any = partial(np.interp, multiplier, side["multiplier"])
            found = by_multiplier[side["multiplier"]].apply(at, axis="columns").rename(metric).reset_index()
            parts.append(found.assign(**labels, **{damage_metric: level, "multiplier": multiplier}))
    columns = [*keys, damage_metric, "multiplier", *index, metric]
    table: Any = pd.concat(parts, ignore_index=True)[columns]
    metrics: tuple[str, ...] = (metric,)
    if reference is not None:
        table, metrics = _with_difference(table, metric, reference), (metric, DIFFERENCE)
    return Scores(table, metrics).summary(**bootstrap).drop(columns="examples")


def _multiplier_at(level: float, side: Any, damage_metric: str) -> float:
    """The multiplier nearest to 0 with a level of damage, interpolated; NaN if there is none."""
    side = side.dropna().sort_values("multiplier", key=abs)
    damage, multipliers = (side[name].to_numpy(dtype=float) for name in (damage_metric, "multiplier"))
    if damage_metric in _QUADRATIC:
        level, damage = level**0.5, damage.clip(0) ** 0.5
    reaches = np.flatnonzero(damage >= level)
    if not len(reaches) or (reaches[0] == 0 and damage[0] > level):
        return float("nan")
    end = int(reaches[0])
    return float(np.interp(level, damage[: end + 1][-2:], multipliers[: end + 1][-2:]))


def _with_difference(table: Any, metric: str, reference: Mapping[str, Any]) -> Any:
    """Adds how far each example's metric is above the reference's."""
    own = table[(table[list(reference)] == pd.Series(reference)).all(axis="columns")]
    if own.empty:
        raise ConfigError(f"reference={dict(reference)}: no scores have these labels.")
    own = own.drop(columns=["multiplier", *reference]).rename(columns={metric: DIFFERENCE})
    found = table.merge(own, how="left")
    return found.assign(**{DIFFERENCE: found[metric] - found[DIFFERENCE]})
