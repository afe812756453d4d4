"""Plots of the study: a panel for each behaviour, a line with its interval for each method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from yapo_peft.evaluation import Scores
from yapo_peft.evaluation.plots import COLOURS

Line = tuple[str, str, list[tuple[float, float, float, float]]]


def dose_lines(doses: pd.DataFrame) -> list[Line]:
    """Panel, method, and its points `(x, y, low, high)`."""
    return [
        (
            behaviour,
            method,
            list(zip(*(part[c] for c in ("multiplier", "margin", "margin_low", "margin_high")), strict=True)),
        )
        for (behaviour, method), part in doses.sort_values("multiplier").groupby(["behaviour", "method"], sort=False)
    ]


def damage_lines(gains: Scores, harm: pd.DataFrame, most: float) -> list[Line]:
    """Gains against the KL, which is given the sign of the multiplier."""
    found = gains.summary().merge(harm, on=["behaviour", "method", "multiplier"])
    found = found.assign(signed=found["kl"] * np.sign(found["multiplier"])).sort_values("signed")
    columns = ("signed", "gain", "gain_low", "gain_high")
    return [
        (behaviour, method, list(zip(*(part[c] for c in columns), strict=True)))
        for (behaviour, method), part in found[found["kl"] <= most].groupby(["behaviour", "method"], sort=False)
    ]


def draw(path: Path, study: Any, x: str, y: str, lines: list[Line]) -> None:
    """A panel for each behaviour, a line with its interval for each method."""
    styles = dict(zip(study.methods, ((colour, dash) for dash in ("-", "--", ":") for colour in COLOURS), strict=False))
    behaviours, methods = list(study.behaviours), list(study.methods)
    lines = sorted(lines, key=lambda line: (behaviours.index(line[0]), methods.index(line[1])))
    panels = list(dict.fromkeys(panel for panel, _, _ in lines))
    if not panels:
        return
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.9 * rows + 0.5), layout="constrained")
    axes = dict(zip(panels, np.ravel(figure.subplots(rows, columns, squeeze=False)), strict=False))
    for panel, method, points in lines:
        at, mean, low, high = (np.array(values, dtype=float) for values in zip(*points, strict=True))
        colour, dash = styles[method]
        axes[panel].plot(at, mean, marker="o", linestyle=dash, markersize=3, color=colour, label=method)
        axes[panel].fill_between(at, low, high, color=colour, alpha=0.12, linewidth=0)
    labels: dict[str, Any] = {}
    for index, (panel, one) in enumerate(axes.items()):
        one.set(title=panel, xlabel=x, ylabel=y if index % columns == 0 else "")
        one.spines[["top", "right"]].set_visible(False)
        handles, names = one.get_legend_handles_labels()
        labels |= dict(zip(names, handles, strict=True))
    figure.legend(labels.values(), labels, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=110)
