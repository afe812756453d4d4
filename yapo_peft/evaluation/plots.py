"""Plots of measurements."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from .._utils import replacing
from ..errors import ConfigError
from .scores import SEED, Scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A palette for readers with colour vision deficiency (Okabe and Ito, 2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999", "#F0E442")
_AXES = {
    "loss": "loss (nats)",
    "accuracy": "accuracy (% of examples)",
    "margin": "mean margin (nats)",
    "margin_per_token": "mean margin (nats per token)",
    "kl": "KL from the unsteered model (nats per token)",
    "nll": "negative log-likelihood (nats per token)",
    "repeated": "repeated runs of words (%)",
    "answered": "answers that name an option (%)",
    "top_changed": "changed most likely next tokens (%)",
    "score": "mean judge score",
}
_SHARES = ("accuracy", "repeated", "answered", "top_changed")


def plot_dose_response(
    scores: Scores, path: str | Path, title: str, *, metrics: Sequence[str] | None = None, **bootstrap: Any
) -> Path:
    """Plots metrics against the multiplier, one line per method, with bootstrap intervals.

    Args:
        scores: Scores of `sweep`, or several concatenated with labels such as "method"; at least two multipliers.
        path: File to write; the extension sets the format, such as ".png" or ".svg".
        title: Title of the plot.
        metrics: Metrics to plot; all if None.
        **bootstrap: For `Scores.summary`.

    Returns:
        The path.

    Raises:
        ConfigError: There are fewer than two multipliers, there is no such metric, or matplotlib does not support the
            extension.
        ImportError: matplotlib is not installed.
    """
    require_plot_path(path)
    return _save(dose_response_figure(scores, title, metrics=metrics, **bootstrap), path)


def dose_response_figure(
    scores: Scores, title: str, *, metrics: Sequence[str] | None = None, **bootstrap: Any
) -> Figure:
    """As `plot_dose_response`, but returns the figure."""
    metrics = list(scores.metrics if metrics is None else metrics)
    unknown = [name for name in metrics if name not in scores.metrics]
    if unknown or not metrics:
        raise ConfigError(f"metrics={metrics!r}: must be among {', '.join(map(repr, scores.metrics))}.")
    require_dose_response(scores.table["multiplier"].tolist())
    summary = scores.summary(**bootstrap)
    figure = _figure(len(metrics))
    for axes, metric in zip(figure.axes, metrics, strict=True):
        _draw(axes, summary, scores.labels, "multiplier", metric)
        axes.axvline(0, color="0.8", zorder=0)
        if metric == "margin":
            axes.axhline(0, color="0.8", zorder=0)
    figure.suptitle(f"{title} ({max(summary['examples'])} examples)")
    return finished(figure)


def plot_matched_damage(
    table: pd.DataFrame, path: str | Path, title: str, *, metric: str, damage_metric: str = "kl"
) -> Path:
    """Plots the table of `at_matched_damage`: effect against damage, one line per method.

    Raises:
        ConfigError: The table has no such columns, or matplotlib does not support the extension.
        ImportError: matplotlib is not installed.
    """
    missing = [name for name in (metric, damage_metric, "multiplier") if name not in table.columns]
    if missing:
        raise ConfigError(
            f"The table has the columns {list(table.columns)} and lacks {missing}: pass the table of at_matched_damage."
        )
    measured = [name for name in table if {f"{name}_low", f"{name}_high"} <= {*table}]
    own = {f"{name}{end}" for name in measured for end in ("", "_low", "_high")}
    labels = [name for name in table.columns if name not in (damage_metric, "multiplier", *own)]
    require_plot_path(path)
    figure = _figure(1)
    _draw(figure.axes[0], table.dropna(subset=[metric]), labels, damage_metric, metric)
    figure.suptitle(title)
    return _save(finished(figure), path)


def plot_choice(table: pd.DataFrame, path: str | Path, title: str) -> Path:
    """Plots the table of `choose`: how far each candidate moves the margin in both directions, with intervals.

    Raises:
        ConfigError: matplotlib does not support the extension.
        ImportError: matplotlib is not installed.
    """
    require_plot_path(path)
    figure = _figure(1)
    figure.set_size_inches(6.4, 1.4 + 0.42 * len(table))
    axes, places = figure.axes[0], list(range(len(table)))
    for colour, direction in zip(COLOURS, ("up", "down"), strict=False):
        middle = table[direction]
        error = [middle - table[f"{direction}_low"], table[f"{direction}_high"] - middle]
        axes.errorbar(middle, places, xerr=error, fmt="o", color=colour, markersize=5, label=direction)
    axes.set_yticks(places, (table["candidate"] + "\n" + table["steps"].astype(str) + " steps").tolist())
    axes.invert_yaxis()
    axes.axvline(0, color="0.8", zorder=0)
    axes.grid(axis="x", color="0.92")
    axes.tick_params(axis="y", labelsize="small")
    axes.set_xlabel("change in the margin (nats)")
    figure.suptitle(title)
    return _save(finished(figure), path)


def plot_losses(
    histories: Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path, title: str, *, metric: str = "loss"
) -> Path:
    """Plots a metric of training runs against their steps.

    Args:
        histories: Each run's `trainer.state.log_history`, by name.
        path: File to write; the extension sets the format.
        title: Title of the plot.
        metric: The logged metric, such as "loss", "eval_loss", "margin/plus" or "code/nonzero".

    Raises:
        ConfigError: A run did not log it, or matplotlib does not support the extension.
        ImportError: matplotlib is not installed.
    """
    require_plot_path(path)
    return _save(losses_figure(histories, title, metric=metric), path)


def losses_figure(histories: Mapping[str, Sequence[Mapping[str, Any]]], title: str, *, metric: str = "loss") -> Figure:
    """As `plot_losses`, but returns the figure."""
    figure = _figure(1)
    for colour, (name, history) in zip(cycle(COLOURS), histories.items(), strict=False):
        points = [(entry["step"], float(entry[metric])) for entry in history if metric in entry]
        if not points:
            there = sorted({key for entry in history for key in entry})
            raise ConfigError(f"The run {name!r} did not log {metric!r}; it logged {', '.join(there) or 'nothing'}.")
        figure.axes[0].plot(*zip(*points, strict=True), "o-", color=colour, markersize=3, label=name)
    figure.axes[0].set(xlabel="step", ylabel=_AXES.get(metric, metric))
    figure.suptitle(title)
    return finished(figure)


def require_plot_path(path: str | Path) -> None:
    """Checks before any work that a plot can be saved.

    Raises:
        ConfigError: matplotlib does not support the extension.
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'yapo-peft[plots]'.") from error
    known = FigureCanvasBase.get_supported_filetypes()
    if Path(path).suffix[1:].lower() not in known:
        raise ConfigError(
            f"path={str(path)!r}: the extension must be one of {', '.join(f'.{kind}' for kind in known)}."
        )


def require_dose_response(multipliers: Iterable[float]) -> None:
    """Raises `ConfigError` unless there are at least two multipliers."""
    found = sorted(set(multipliers))
    if len(found) < 2:
        raise ConfigError(f"multipliers={found}: a dose-response needs at least two multipliers.")


def _figure(panels: int) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * panels, 3.7), layout="constrained")
    figure.subplots(1, panels)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.92")
    return figure


def _draw(axes: Any, table: pd.DataFrame, labels: Sequence[str], x: str, metric: str) -> None:
    """Draws a line with its interval for each combination of label values."""
    factor = 100 if metric in _SHARES else 1
    for colour, (name, line) in zip(cycle(COLOURS), _lines(table, labels), strict=False):
        line = line.sort_values(x)
        axes.plot(line[x], factor * line[metric], "o-", color=colour, markersize=4, label=name)
        low, high = factor * line[f"{metric}_low"], factor * line[f"{metric}_high"]
        axes.fill_between(line[x], low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel=_AXES.get(x, x), ylabel=_AXES.get(metric, metric))


def _lines(table: pd.DataFrame, labels: Sequence[str]) -> list[tuple[str | None, pd.DataFrame]]:
    """Splits a table into lines, with their names."""
    keys = [name for name in labels if name != SEED]
    if not keys:
        return [(None, table)]
    # A label with the same value on all lines does not tell them apart.
    said = [name for name in keys if len(set(table[name])) > 1] or keys[:1]
    return [
        (", ".join(str(part[name].iloc[0]) for name in said), part)
        for _, part in table.groupby(keys, sort=False, dropna=False)
    ]


def finished(figure: Figure) -> Figure:
    """Adds a legend if the lines have names, and shows dollars in names and titles as they are."""
    from matplotlib.text import Text

    if figure.axes[0].get_legend_handles_labels()[0]:
        figure.axes[-1].legend(frameon=False, fontsize="small")
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    return figure


def _save(figure: Figure, path: str | Path) -> Path:
    """Saves to a temporary file first, so that a failure leaves no partial plot."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150, format=path.suffix[1:])
    return path
