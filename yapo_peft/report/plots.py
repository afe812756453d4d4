"""Plots as inline SVG in the page's colours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from io import StringIO
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd

from ..evaluation.plots import COLOURS, dose_response_figure, losses_figure
from ..evaluation.scores import Scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Placeholder for the page's text colour, which follows the reader's theme.
_INK = "#010203"


def figure_as_svg(figure: Figure, text: str) -> str:
    """Converts a figure to an SVG element in the surrounding text's colour.

    Args:
        figure: A matplotlib figure.
        text: Its description for screen readers.
    """
    from matplotlib import rc_context

    for axes in figure.axes:
        axes.set_facecolor("none")
        for spine in axes.spines.values():
            spine.set_color(_INK)
        axes.tick_params(colors=_INK, labelsize="small")
        for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
            label.set_color(_INK)
            label.set_fontsize("small")
        axes.grid(axis="y", color=_INK, alpha=0.12)
        legend = axes.get_legend()
        for entry in legend.get_texts() if legend is not None else []:
            entry.set_color(_INK)
    figure.suptitle("")
    buffer = StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": text, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\n?", "", svg, flags=re.DOTALL)
    # IDs must be unique on the page: unused ones are removed, and the others get a prefix.
    own = re.sub(r"\W+", "-", text)
    named, seen = set(re.findall(r"#([\w.-]+)", svg)), set[str]()

    def renamed(found: re.Match[str]) -> str:
        name = found[1]
        is_needed = name in named and name not in seen
        seen.add(name)
        return f' id="{own}-{name}"' if is_needed else ""

    svg = re.sub(r' id="([\w.-]+)"', renamed, svg)
    svg = re.sub(r'(url\(|href=")#([\w.-]+)', rf"\g<1>#{own}-\2", svg)
    return re.sub(r"^<svg ", f'<svg role="img" aria-label="{escape(text)}" ', svg)


def dose_response(scores: Scores, metrics: Sequence[str], of: str) -> list[str]:
    """Plots of metrics against the multiplier, one each, so that they wrap on a narrow page."""
    return [
        figure_as_svg(dose_response_figure(scores, "", metrics=[metric]), f"{metric} on {of} by multiplier")
        for metric in metrics
    ]


def losses(history: Sequence[dict[str, Any]]) -> str | None:
    """A plot of the training and evaluation losses; None if the log has none."""
    runs = {
        name: [{"step": entry["step"], "loss": entry[metric]} for entry in history if metric in entry]
        for name, metric in (("training", "loss"), ("evaluation", "eval_loss"))
    }
    runs = {name: run for name, run in runs.items() if run}
    return figure_as_svg(losses_figure(runs, ""), "Training loss by step") if runs else None


def attribution_bars(features: pd.DataFrame) -> str:
    """A bar plot of the features' contributions, by both methods."""
    from matplotlib.figure import Figure

    shown = cast(pd.DataFrame, features.dropna(subset="left_out")[::-1])
    several = len(set(shown["layer"])) > 1
    names = [_named(row, several) for row in shown.itertuples()]
    figure = Figure(figsize=(5.4, 0.6 + 0.3 * len(shown)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(shown))
    axes.barh(places + 0.2, shown["left_out"], height=0.38, color=COLOURS[0], label="left out")
    axes.barh(places - 0.2, shown["integrated"], height=0.38, color=COLOURS[1], label="integrated gradients")
    axes.set_yticks(places, names)
    axes.axvline(0, color=_INK, linewidth=0.8)
    axes.set(xlabel="contribution to the mean margin (nats)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    return figure_as_svg(figure, "Contributions of features to the margin")


def _named(row: Any, with_block: bool) -> str:
    feature = "vector" if pd.isna(row.feature) else str(row.feature)
    return f"{row.layer}: {feature}" if with_block else feature
