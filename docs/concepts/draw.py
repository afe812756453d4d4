"""Draws the figures of the concept pages: python docs/concepts/draw.py"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

BLUE, RED, GREY = "#0072B2", "#D55E00", "#777777"


def clipping() -> Figure:
    """What happens to one feature: raised by the same everywhere, lowered only where it is on."""
    figure = Figure(figsize=(7.6, 3.1), layout="constrained")
    left, right = figure.subplots(1, 2)
    on = np.linspace(0, 3, 301)
    for value, colour, label in ((1, BLUE, "m·v = +1: raised"), (-1, RED, "m·v = -1: lowered")):
        steered = np.maximum(on + value, 0)
        left.plot(on, steered, color=colour, label=label)
        right.plot(on, steered - on, color=colour)
    left.plot(on, on, color=GREY, linestyle=":", label="m·v = 0")
    left.set(xlabel="feature before, f", ylabel="feature after, ReLU(f + m·v)", title="the feature")
    left.legend(frameon=False)
    right.set(xlabel="feature before, f", ylabel="difference", title="what is added along its decoder row")
    right.axhline(0, color=GREY, linestyle=":")
    return figure


def training() -> Figure:
    """One pair, two directions, one frozen model."""
    figure = Figure(figsize=(7.6, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set(xlim=(0, 10), ylim=(0, 5))

    def box(x: float, y: float, width: float, text: str, colour: str = GREY) -> None:
        axes.add_patch(FancyBboxPatch((x, y), width, 0.9, boxstyle="round,pad=0.08", fill=False, edgecolor=colour))
        axes.text(x + width / 2, y + 0.45, text, ha="center", va="center", fontsize=8.5, color=colour)

    def arrow(start: tuple[float, float], end: tuple[float, float], colour: str = GREY) -> None:
        axes.add_patch(FancyArrowPatch(start, end, arrowstyle="->", mutation_scale=10, color=colour))

    box(0.1, 2, 1.7, "prompt +\nchosen, rejected")
    box(2.4, 2, 1.6, "blocks below\n(frozen, once)")
    for y, text, colour in ((3.7, "code x (+1)", BLUE), (2, "code x 0", GREY), (0.3, "code x (-1)", RED)):
        box(4.6, y, 1.4, text, colour)
        arrow((4.1, 2.45), (4.5, y + 0.45), colour)
        box(6.6, y, 1.4, "blocks above\n(frozen)", colour)
        arrow((6.1, y + 0.45), (6.5, y + 0.45), colour)
        arrow((8.1, y + 0.45), (8.5, y + 0.45), colour)
    arrow((1.9, 2.45), (2.3, 2.45))
    for y, text, colour in (
        (4.15, "raise the chosen", BLUE),
        (2.45, "the reference", GREY),
        (0.75, "raise the rejected", RED),
    ):
        axes.text(8.6, y, text, va="center", fontsize=8.5, color=colour)
    return figure


def main() -> None:
    """Draws all of them beside this file."""
    matplotlib.rcParams["svg.hashsalt"] = "yapo"  # the same figure, the same file
    matplotlib.rcParams["svg.fonttype"] = "none"
    for draw in (clipping, training):
        path = Path(__file__).with_name(f"{draw.__name__}.svg")
        draw().savefig(path, metadata={"Date": None})
        print(path)


if __name__ == "__main__":
    main()
