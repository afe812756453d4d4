"""Cultural alignment: whether a model answers for a country even if the question does not name it.

Both formulas follow the description in arXiv 2601.08441, which ships no code for them.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pandas as pd

from ..errors import ConfigError
from .scores import SEED, Scores, by_seed_and_example, interval, mean_of_known, require_bootstrap, resampled_means

LOCALIZED, NONLOCALIZED = "localized", "nonlocalized"


def robust_cultural_accuracy(localized: float, nonlocalized: float) -> float:
    """RCA: the harmonic mean of both accuracies, `2 l n / (l + n)`; 0 if either is 0. Higher is better."""
    total = localized + nonlocalized
    return 2 * localized * nonlocalized / total if total else 0.0


def normalised_localization_gap(localized: float, nonlocalized: float) -> float:
    """PNLG: the gap divided by the mean, `(l - n) / ((l + n) / 2)`; NaN if both are 0. Nearer to 0 is better."""
    mean = (localized + nonlocalized) / 2
    return (localized - nonlocalized) / mean if mean else float("nan")


def cultural_scores(
    scores: Scores,
    status: str = "localization_status",
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """RCA and PNLG of multiple-choice scores that are labelled as localized and nonlocalized.

    Args:
        scores: With a metric `accuracy` and a label that is "localized" where the question names the country, and
            "nonlocalized" where it says "your country"; such as `Scores.concat([a.labelled(localization_status=
            "localized"), b.labelled(localization_status="nonlocalized")])`.
        status: Name of that label.
        confidence: As for `Scores.summary`.
        resamples: As for `Scores.summary`.
        seed: As for `Scores.summary`.

    Returns:
        A row per multiplier and combination of other labels (such as country or method): `localized`, `nonlocalized`,
        `rca` and `pnlg`, and the bounds of bootstrap intervals for the latter two (`rca_low`, `rca_high`, ...).
        Questions of both kinds with the same index are resampled together, as pairs that differ only in the country's
        name. Seeds are averaged.

    Raises:
        ConfigError: There is no such metric or label, one of the two kinds is missing, or a bootstrap argument is
            invalid.
    """
    if "accuracy" not in scores.metrics or status not in scores.labels:
        raise ConfigError(
            f"The scores have the metrics {list(scores.metrics)} and the labels {scores.labels}: RCA and PNLG need "
            f"'accuracy' and {status!r}."
        )
    require_bootstrap(confidence, resamples)
    keys = [name for name in scores.labels if name not in (SEED, status)] + ["multiplier"]
    rows: list[dict[str, Any]] = []
    for values, group in scores.table.groupby(keys, sort=False, dropna=False):
        row = dict(zip(keys, cast(tuple[Any, ...], values), strict=True))
        missing = {LOCALIZED, NONLOCALIZED} - set(group[status])
        if missing:
            raise ConfigError(f"{row}: {status} lacks {sorted(missing)}: measure both kinds.")
        parts = [cast(pd.DataFrame, group[group[status] == kind]) for kind in (LOCALIZED, NONLOCALIZED)]
        kinds = [by_seed_and_example(part, "accuracy") for part in parts]
        row[LOCALIZED], row[NONLOCALIZED] = map(mean_of_known, kinds)
        draws = [resampled_means(matrix, resamples, seed) for matrix in kinds]
        for name, statistic in (("rca", robust_cultural_accuracy), ("pnlg", normalised_localization_gap)):
            row[name] = statistic(row[LOCALIZED], row[NONLOCALIZED])
            resampled = np.array([statistic(*pair) for pair in zip(*draws, strict=True)])
            row[f"{name}_low"], row[f"{name}_high"] = interval(resampled, confidence)
        rows.append(row)
    return pd.DataFrame(rows)
