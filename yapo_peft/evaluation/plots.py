"""Pictures of measurements."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError
from .preference import PreferenceScore


def plot_dose_response(scores: Sequence[PreferenceScore], path: str | Path, title: str) -> Path:
    """Draws preference accuracy and margin against the strength of steering.

    Args:
        scores: What `sweep_preferences` returned; at least two strengths.
        path: File to write; its ending chooses the format, such as ".png" or ".svg".
        title: What was measured.

    Returns:
        The path.

    Raises:
        ConfigError: There are fewer than two scores, or the path has no ending.
        ImportError: matplotlib is not installed.
    """
    if len(scores) < 2:
        raise ConfigError(f"A dose-response needs at least two strengths, got {len(scores)}.")
    if not Path(path).suffix:
        raise ConfigError(f"path={str(path)!r} has no ending, which chooses the format: give one such as '.png'.")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install 'yapo-peft[plots]'.") from error
    ordered = sorted(scores, key=lambda score: score.multiplier)
    strengths = [score.multiplier for score in ordered]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(strengths, [100 * score.accuracy for score in ordered], "o-", color="#1f6f8b")
    left.set(ylabel="chosen answer more likely (% of pairs)", ylim=(-3, 103))
    right.plot(strengths, [score.margin for score in ordered], "o-", color="#b5542b")
    right.set(ylabel="mean margin (nats per answer)")
    for axes in (left, right):
        axes.axvline(0, color="0.8", zorder=0)
        axes.set(xlabel="multiplier")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.92")
    left.axhline(50, color="0.8", linestyle=":", zorder=0)
    right.axhline(0, color="0.8", zorder=0)
    figure.suptitle(f"{title} ({ordered[0].pairs} held-out pairs)")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written beside the target and renamed, so that a failure leaves no half picture.
    partial = path.with_name(f".partial-{path.name}")
    figure.savefig(partial, dpi=150)
    partial.replace(path)
    return path
