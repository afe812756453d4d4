"""Scores of examples at several multipliers, with bootstrap intervals of their means."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from .._utils import replacing
from ..errors import ConfigError, DatasetError

_OWN = ("multiplier", "example", "answer")
# The label that numbers repetitions of one measurement.
SEED = "seed"


@dataclass(frozen=True)
class Scores:
    """Metrics of each example at each multiplier.

    Attributes:
        table: A row per example and multiplier: `multiplier`, `example` (its index in the dataset), `answer` where one
            was generated, a column per metric, and one per label. NaN means not measurable.
        metrics: Names of the metrics' columns.
    """

    table: pd.DataFrame
    metrics: tuple[str, ...]

    @property
    def labels(self) -> list[str]:
        """Names of the label columns, such as "method"."""
        return [name for name in self.table.columns if name not in (*_OWN, *self.metrics)]

    def labelled(self, **labels: Any) -> Scores:
        """Adds labels: `scores.labelled(method="CAA", seed=0)`.

        The label `seed` numbers repetitions of a measurement; other labels distinguish measurements.
        """
        summarised = (f"{metric}_{end}" for metric in self.metrics for end in ("low", "high"))
        taken = [name for name in labels if name in (*_OWN, *self.metrics, "examples", "gain", *summarised)]
        if taken:
            raise ConfigError(
                f"{taken[0]!r} is already a column of the scores or of their summary: choose another label."
            )
        return Scores(self.table.assign(**labels), self.metrics)

    @staticmethod
    def concat(parts: Sequence[Scores]) -> Scores:
        """Concatenates scores.

        Raises:
            ConfigError: Metrics or labels differ, or an example occurs twice at a multiplier.
        """
        if not parts:
            raise ConfigError("There are no scores to concatenate.")
        first = parts[0]
        for part in parts:
            if set(part.metrics) != set(first.metrics) or set(part.labels) != set(first.labels):
                raise ConfigError(
                    f"Scores of {sorted(part.metrics)} with the labels {sorted(part.labels)} and of "
                    f"{sorted(first.metrics)} with {sorted(first.labels)} cannot be concatenated: metrics and "
                    "labels must be the same."
                )
        table = pd.concat([part.table for part in parts], ignore_index=True)
        keys = ["multiplier", "example", *first.labels]
        if table.duplicated(keys).any():
            raise ConfigError(
                f"Some examples are measured twice at a multiplier, with the labels {first.labels}: tell the parts "
                'apart with labelled(method="...") or labelled(seed=...).'
            )
        return Scores(table, first.metrics)

    def gains(self, metric: str) -> Scores:
        """How far a metric of each example is from its own value at multiplier 0, as the metric `gain`.

        Intervals of gains are paired ones: how much examples differ without steering is not in them.

        Raises:
            ConfigError: There is no such metric, or multiplier 0 was not measured.
        """
        if metric not in self.metrics:
            raise ConfigError(f"There is no metric {metric!r}; the scores have {', '.join(map(repr, self.metrics))}.")
        keys = [*self.labels, "example"]
        table: Any = self.table
        rows = table.set_index(keys)[metric]
        base = rows[(table["multiplier"] == 0).to_numpy()]
        if not rows.index.isin(base.index).all():
            raise ConfigError("Gains are measured from multiplier 0: measure all examples at it too.")
        gain = rows.to_numpy() - base.reindex(rows.index).to_numpy()
        return Scores(table.assign(gain=gain)[[*keys, "multiplier", "gain"]], ("gain",))

    def summary(self, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
        """Means over examples, and over seeds where there are several, with bootstrap intervals.

        Intervals are percentile bootstrap intervals over examples and seeds.

        Args:
            confidence: Confidence level, between 0 and 1.
            resamples: Number of resamples.
            seed: Random seed; all rows use the same resamples, so that they can be compared.

        Returns:
            A row per multiplier and labels other than `seed`: for each metric its mean and the interval's bounds
            (`accuracy`, `accuracy_low`, `accuracy_high`), and `examples`, the number of them.

        Raises:
            ConfigError: `confidence` or `resamples` is out of range.
        """
        require_bootstrap(confidence, resamples)
        keys = [*(name for name in self.labels if name != SEED), "multiplier"]
        found: list[dict[str, Any]] = []
        for values, group in self.table.groupby(keys, sort=False, dropna=False):
            row = dict(zip(keys, cast(tuple[Any, ...], values), strict=True))
            row["examples"] = group["example"].nunique()
            for metric in self.metrics:
                matrix = by_seed_and_example(group, metric)
                low, high = interval(resampled_means(matrix, resamples, seed), confidence)
                row |= {metric: mean_of_known(matrix), f"{metric}_low": low, f"{metric}_high": high}
            found.append(row)
        return pd.DataFrame(found)

    def save(self, path: str | Path) -> Path:
        """Saves the table as JSON; if that fails, an existing file is kept."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = json.loads(cast(str, self.table.to_json(orient="records", double_precision=15)))
        with replacing(path) as partial:
            partial.write_text(json.dumps({"metrics": self.metrics, "rows": rows}))
        return path

    @staticmethod
    def load(path: str | Path) -> Scores:
        """Loads scores from a file of `save`.

        Raises:
            DatasetError: The file has another format.
        """
        try:
            content = json.loads(Path(path).read_text())
            metrics = tuple(content["metrics"])
            table = pd.DataFrame(content["rows"])
            return Scores(table.astype(dict.fromkeys(metrics, float)), metrics)
        except (ValueError, KeyError, TypeError) as error:
            raise DatasetError(f"{str(path)!r} is not a file of scores ({error!r}).") from error


def distinct(multipliers: Iterable[float]) -> list[float]:
    """Returns the multipliers of a sweep as a list.

    Raises:
        ConfigError: There are none, or one occurs twice.
    """
    multipliers = [float(value) for value in multipliers]
    if not multipliers or len(set(multipliers)) < len(multipliers):
        raise ConfigError(f"multipliers={multipliers!r}: must be at least one multiplier, without duplicates.")
    return multipliers


def require_bootstrap(confidence: float, resamples: int) -> None:
    """Checks the arguments of a bootstrap.

    Raises:
        ConfigError: `confidence` or `resamples` is out of range.
    """
    if not 0 < confidence < 1 or resamples < 1:
        raise ConfigError(
            f"confidence={confidence}, resamples={resamples}: confidence must be between 0 and 1, resamples at least 1."
        )


def by_seed_and_example(group: pd.DataFrame, metric: str) -> np.ndarray:
    """Values of a metric, `(seeds, examples)`."""
    if SEED not in group.columns:
        return group[metric].to_numpy(dtype=float)[None]
    return group.pivot_table(index=SEED, columns="example", values=metric, dropna=False).to_numpy(dtype=float)


def mean_of_known(matrix: np.ndarray) -> float:
    """The mean of the finite values; NaN if there are none."""
    known = matrix[np.isfinite(matrix)]
    return float(known.mean()) if len(known) else float("nan")


def resampled_means(matrix: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """The mean of each resample of seeds and examples, `(resamples,)`; NaN if it has no finite value."""
    seeds, examples = matrix.shape
    generator = np.random.default_rng(seed)
    of_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), resamples).astype(float)
    of_examples = generator.multinomial(examples, np.full(examples, 1 / examples), resamples).astype(float)
    known = np.isfinite(matrix)
    total = ((of_seeds @ np.where(known, matrix, 0.0)) * of_examples).sum(axis=1)
    count = ((of_seeds @ known.astype(float)) * of_examples).sum(axis=1)
    return np.divide(total, count, out=np.full(resamples, np.nan), where=count > 0)


def interval(statistics: np.ndarray, confidence: float) -> tuple[float, float]:
    """Bounds of the percentile interval of resampled statistics, without NaN."""
    low, high = pd.Series(statistics).quantile([(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
