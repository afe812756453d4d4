"""Cultural alignment: does a model know a country also where the question does not name it?

Both formulas follow the description in arXiv 2601.08441, which ships no code for them.
"""

from __future__ import annotations

import pandas as pd

from ..errors import ConfigError
from .scores import SEED, Scores

LOCALIZED, NONLOCALIZED = "localized", "nonlocalized"


def robust_cultural_accuracy(localized: float, nonlocalized: float) -> float:
    """RCA: the harmonic mean of both accuracies, `2 l n / (l + n)`; 0 if either is 0. Higher is better."""
    total = localized + nonlocalized
    return 2 * localized * nonlocalized / total if total else 0.0


def normalised_localization_gap(localized: float, nonlocalized: float) -> float:
    """PNLG: the gap divided by the mean, `(l - n) / ((l + n) / 2)`; NaN if both are 0. Nearer to 0 is better."""
    mean = (localized + nonlocalized) / 2
    return (localized - nonlocalized) / mean if mean else float("nan")


def cultural_scores(scores: Scores, status: str = "localization_status") -> pd.DataFrame:
    """RCA and PNLG of multiple-choice scores that are labelled as localized and nonlocalized.

    Args:
        scores: With a metric `accuracy` and a label that is "localized" where the question names the country, and
            "nonlocalized" where it says "your country"; such as `Scores.concat([a.labelled(localization_status=
            "localized"), b.labelled(localization_status="nonlocalized")])`.
        status: Name of that label.

    Returns:
        A row per strength and other labels (such as country or method): `localized`, `nonlocalized`, `rca`, `pnlg`.
        Seeds are averaged.

    Raises:
        ConfigError: There is no such metric or label, or one of the two is missing.
    """
    if "accuracy" not in scores.metrics or status not in scores.labels:
        raise ConfigError(
            f"The scores have the metrics {list(scores.metrics)} and the labels {scores.labels}: RCA and PNLG need "
            f"'accuracy' and {status!r}."
        )
    keys = [name for name in scores.labels if name not in (SEED, status)] + ["multiplier"]
    table = scores.table.pivot_table(index=keys, columns=status, values="accuracy", aggfunc="mean", sort=False)
    missing = {LOCALIZED, NONLOCALIZED} - set(table.columns)
    if missing:
        raise ConfigError(f"{status} has {list(table.columns)}, but no {sorted(missing)}: measure both kinds.")
    table = table[[LOCALIZED, NONLOCALIZED]]
    pairs = list(zip(table[LOCALIZED], table[NONLOCALIZED], strict=True))
    table = table.assign(
        rca=[robust_cultural_accuracy(*pair) for pair in pairs],
        pnlg=[normalised_localization_gap(*pair) for pair in pairs],
    )
    return table.reset_index().rename_axis(columns=None)
