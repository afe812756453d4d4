"""Compares methods at the same damage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import pandas as pd

from ..errors import ConfigError
from .scores import SEED, Scores

# Damage that is 0 without steering and grows with the square of small multipliers.
_QUADRATIC = ("kl",)
# The column of a multiplier's damage, beside metrics that may have the same name.
_HARM = "damage at the multiplier"
# How far a metric is above that of the reference.
_DIFFERENCE = "difference"


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
            interval is of paired examples, and so narrower than those of both methods. Their other labels must be the
            same; seeds that the reference lacks are compared with its mean over seeds.
        **bootstrap: For `Scores.summary`.

    Returns:
        A row per level and labels: `multiplier`, `metric`, and the bounds of its interval; NaN where the largest
        multiplier does less damage than that. With `reference`, also `difference` and its bounds.

    Raises:
        ConfigError: Labels differ, there is no such metric, level or reference, or there are no multipliers on that
            side of 0.
    """
    keys = [name for name in effect.labels if name != SEED]
    if reference is not None and (not reference or not set(reference) <= set(keys)):
        raise ConfigError(f"reference={dict(reference)}: must give labels of the scores, which are {keys}.")
    found = effects_at(levels, effect, damage, metric, damage_metric, negative)
    if reference is not None:
        found = Scores(_with_difference(found.table, metric, reference), (metric, _DIFFERENCE))
    return found.summary(**bootstrap).drop(columns="examples")


def effects_at(
    levels: Sequence[float], effect: Scores, damage: Scores, metric: str, damage_metric: str, negative: bool
) -> Scores:
    """Of each example, what `at_matched_damage` gives the means of; with its arguments."""
    for scores, name in ((effect, metric), (damage, damage_metric)):
        if name not in scores.metrics:
            raise ConfigError(f"There is no metric {name!r}; the scores have {', '.join(map(repr, scores.metrics))}.")
    levels = list(dict.fromkeys(levels))
    if not levels or (damage_metric in _QUADRATIC and min(levels) < 0):
        raise ConfigError(f"levels={levels}: give at least one; {damage_metric} is nowhere negative.")
    keys = [name for name in effect.labels if name != SEED]
    if set(keys) != {name for name in damage.labels if name != SEED}:
        raise ConfigError(
            f"effect has the labels {effect.labels}, damage has {damage.labels}: give both the same ones."
        )
    # Its means, on which a bootstrap would be wasted.
    harm: Any = damage.summary(resamples=1)[[*keys, "multiplier", damage_metric]]
    both: Any = effect.table.merge(harm.rename(columns={damage_metric: _HARM}), how="left", indicator=True)
    index = [name for name in (SEED, "example") if name in effect.table]
    parts: list[Any] = []
    for labels, rows in both.groupby(keys, sort=False, dropna=False) if keys else [((), both)]:
        by_multiplier = rows.set_index([*index, "multiplier"])[metric].astype(float).unstack()
        side = rows[rows["_merge"] == "both"].drop_duplicates("multiplier")[["multiplier", _HARM]]
        side = side[side["multiplier"] <= 0] if negative else side[side["multiplier"] >= 0]
        side = side.sort_values("multiplier")
        if len(side) < 2:
            sign = "<= 0" if negative else ">= 0"
            raise ConfigError(
                f"{dict(zip(keys, labels, strict=True)) or 'The scores'}: effect and damage have {len(side)} "
                f"multipliers {sign} in common: measure both at two or more."
            )
        for level in levels:
            multiplier = _multiplier_at(level, side, damage_metric in _QUADRATIC)
            at: Any = partial(np.interp, multiplier, side["multiplier"])
            found = by_multiplier[side["multiplier"]].apply(at, axis="columns").rename(metric).reset_index()
            found[damage_metric], found["multiplier"] = level, multiplier
            for name in keys:
                found[name] = rows[name].iloc[0]
            parts.append(found)
    columns = [*keys, damage_metric, "multiplier", *index, metric]
    return Scores(cast(Any, pd.concat(parts, ignore_index=True))[columns], (metric,))


def _multiplier_at(level: float, side: Any, is_quadratic: bool) -> float:
    """The multiplier nearest to 0 with a level of damage, interpolated; NaN if there is none."""
    side = side.dropna().sort_values("multiplier", key=abs)
    damage, multipliers = (side[name].to_numpy(dtype=float) for name in (_HARM, "multiplier"))
    if is_quadratic:
        level, damage = level**0.5, damage.clip(0) ** 0.5
    reaches = np.flatnonzero(damage >= level)
    if not len(reaches) or (reaches[0] == 0 and damage[0] > level):
        return float("nan")
    end = int(reaches[0])
    return float(np.interp(level, damage[: end + 1][-2:], multipliers[: end + 1][-2:]))


def _with_difference(table: Any, metric: str, reference: Mapping[str, Any]) -> Any:
    """Adds how far each example's metric is above the reference's."""
    own = table
    for name, value in reference.items():
        own = own[own[name].isna() if pd.isna(value) else own[name] == value]
    if own.empty:
        raise ConfigError(f"reference={dict(reference)}: no scores have these labels.")
    if SEED in table and not set(table[SEED]) <= set(own[SEED]):
        others = [name for name in own if name not in (SEED, metric)]
        own = own.groupby(others, dropna=False, as_index=False)[metric].mean()
    own = own.drop(columns=["multiplier", *reference]).rename(columns={metric: _DIFFERENCE})
    found = table.merge(own, how="left")
    return found.assign(**{_DIFFERENCE: found[metric] - found[_DIFFERENCE]})
