"""Measurements of single examples at several multipliers, and what they say of all."""

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
# The label whose values are repetitions of one measurement, not different ones.
SEED = "seed"


@dataclass(frozen=True)
class Scores:
    """What a measure found, for each example at each multiplier.

    Attributes:
        table: A row per example and multiplier: `multiplier`, `example` (its index in the dataset), `answer` where one
            was generated, a column per metric, and one per label. NaN stands for what could not be measured.
        metrics: Names of the metrics' columns.
    """

    table: pd.DataFrame
    metrics: tuple[str, ...]

    @property
    def labels(self) -> list[str]:
        """Names of the columns that say what was measured, such as "method"."""
        return [name for name in self.table.columns if name not in (*_OWN, *self.metrics)]

    def labelled(self, **labels: Any) -> Scores:
        """The same, saying what it is of: `scores.labelled(method="CAA", seed=0)`.

        A `seed` tells repetitions of one measurement apart; all other labels tell measurements apart.
        """
        summarised = (f"{metric}_{end}" for metric in self.metrics for end in ("low", "high"))
        taken = [name for name in labels if name in (*_OWN, *self.metrics, "examples", *summarised)]
        if taken:
            raise ConfigError(f"{taken[0]!r} is a column of the scores or their summary: give the label another name.")
        return Scores(self.table.assign(**labels), self.metrics)

    @staticmethod
    def concat(parts: Sequence[Scores]) -> Scores:
        """Several scores in one table.

        Raises:
            ConfigError: They are of different metrics, have different labels, or measure an example twice at a
                multiplier.
        """
        if not parts:
            raise ConfigError("There are no scores to put together.")
        first = parts[0]
        for part in parts:
            if set(part.metrics) != set(first.metrics) or set(part.labels) != set(first.labels):
                raise ConfigError(
                    f"Scores of {sorted(part.metrics)} with the labels {sorted(part.labels)} and of "
                    f"{sorted(first.metrics)} with {sorted(first.labels)} do not go together: compare like with like."
                )
        table = pd.concat([part.table for part in parts], ignore_index=True)
        keys = ["multiplier", "example", *first.labels]
        if table.duplicated(keys).any():
            raise ConfigError(
                f"Some examples are measured twice at a multiplier, with the labels {first.labels}: tell the parts "
                f"apart "
                'with labelled(method="...") or labelled(seed=...).'
            )
        return Scores(table, first.metrics)

    def summary(self, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
        """Means over examples, and over seeds where there are several, with bootstrap intervals.

        An interval is the percentile bootstrap's: examples are drawn with replacement, and so are seeds.

        Args:
            confidence: Share of resamples within the interval.
            resamples: How many are drawn.
            seed: Of the drawing; all rows of the summary use the same draws, so that they can be compared.

        Returns:
            A row per multiplier and labels other than `seed`: for each metric its mean and the interval's ends
            (`accuracy`, `accuracy_low`, `accuracy_high`), and `examples`, the number of them.

        Raises:
            ConfigError: `confidence` is no share, or `resamples` is not positive.
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
        """Writes the table as JSON; a failure leaves what was there."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = json.loads(cast(str, self.table.to_json(orient="records", double_precision=15)))
        with replacing(path) as partial:
            partial.write_text(json.dumps({"metrics": self.metrics, "rows": rows}))
        return path

    @staticmethod
    def load(path: str | Path) -> Scores:
        """Reads what `save` wrote.

        Raises:
            DatasetError: The file holds something else.
        """
        try:
            content = json.loads(Path(path).read_text())
            metrics = tuple(content["metrics"])
            table = pd.DataFrame(content["rows"])
            return Scores(table.astype(dict.fromkeys(metrics, float)), metrics)
        except (ValueError, KeyError, TypeError) as error:
            raise DatasetError(f"{str(path)!r} does not hold scores ({error!r}): measure again.") from error


def distinct(multipliers: Iterable[float]) -> list[float]:
    """The multipliers of a sweep.

    Raises:
        ConfigError: There is none, or one is there twice.
    """
    multipliers = [float(value) for value in multipliers]
    if not multipliers or len(set(multipliers)) < len(multipliers):
        raise ConfigError(f"multipliers={multipliers!r}: give one multiplier at least, and each of them once.")
    return multipliers


def require_bootstrap(confidence: float, resamples: int) -> None:
    """Raises unless a bootstrap can be made with that.

    Raises:
        ConfigError: `confidence` is no share, or `resamples` is not positive.
    """
    if not 0 < confidence < 1 or resamples < 1:
        raise ConfigError(f"confidence={confidence}, resamples={resamples}: give a share, and a positive number.")


def by_seed_and_example(group: pd.DataFrame, metric: str) -> np.ndarray:
    """Values of a metric, `(seeds, examples)`."""
    if SEED not in group.columns:
        return group[metric].to_numpy(dtype=float)[None]
    return group.pivot_table(index=SEED, columns="example", values=metric, dropna=False).to_numpy(dtype=float)


def mean_of_known(matrix: np.ndarray) -> float:
    """The mean of what could be measured; NaN if nothing could."""
    known = matrix[np.isfinite(matrix)]
    return float(known.mean()) if len(known) else float("nan")


def resampled_means(matrix: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """The mean in each resample of seeds and of examples, `(resamples,)`; NaN where nothing in it could be measured."""
    seeds, examples = matrix.shape
    generator = np.random.default_rng(seed)
    of_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), resamples).astype(float)
    of_examples = generator.multinomial(examples, np.full(examples, 1 / examples), resamples).astype(float)
    known = np.isfinite(matrix)
    total = ((of_seeds @ np.where(known, matrix, 0.0)) * of_examples).sum(axis=1)
    count = ((of_seeds @ known.astype(float)) * of_examples).sum(axis=1)
    return np.divide(total, count, out=np.full(resamples, np.nan), where=count > 0)


def interval(statistics: np.ndarray, confidence: float) -> tuple[float, float]:
    """Ends of the percentile interval of what resamples gave; NaN says nothing, and is left out."""
    known = statistics[np.isfinite(statistics)]
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.quantile(known, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
