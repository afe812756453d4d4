"""The page that says how well trained SAEs fit their model, which is their card on the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from .._utils import replacing
from .config import SAETrainingConfig

_TEMPLATES = Environment(loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True)
_ROWS = {
    "explained_variance": "explained variance",
    "l0": "active features per token (L0)",
    "dead_features": "dead features",
    "loss_recovered": "loss recovered, relative to the mean",
    "loss_recovered_from_zero": "loss recovered, relative to zero",
    "loss": "next-token loss (nats)",
    "loss_with_reconstruction": "next-token loss with the reconstruction (nats)",
}


def save_page(
    folder: Path,
    model_name: str | None,
    measures: Mapping[int, Mapping[str, float]],
    before: Mapping[int, Mapping[str, float]],
    config: SAETrainingConfig,
) -> None:
    """Writes `README.md` with the measures of SAEs, and of those that they started from, by layer."""
    columns = [
        (f"layer {layer}{suffix}", found[layer])
        for layer in measures
        for suffix, found in ((", before", before), ("", measures))
        if layer in found
    ]
    rows = [(text, [_written(name, found[name]) for _, found in columns]) for name, text in _ROWS.items()]
    first = next(iter(measures.values()))
    text = _TEMPLATES.get_template("page.md.jinja").render(
        model=model_name,
        layers=list(measures),
        columns=[name for name, _ in columns],
        rows=rows,
        tokens=int(first["tokens"]),
        config=config,
        settings=[(name, value) for name, value in asdict(config).items() if value is not None and name != "store"],
        versions=[(name, version(name)) for name in ("yapo-peft", "sae-lens", "transformers", "torch")],
    )
    with replacing(folder / "README.md") as partial:
        partial.write_text(text, encoding="utf-8")


def _written(name: str, value: float) -> str:
    if name == "dead_features":
        return f"{value:.2%}"
    return f"{value:.1f}" if name == "l0" else f"{value:.4f}"


def hub_name(model: Any) -> str | None:
    """The name of a model on the Hub; None if it is of a local folder."""
    name = getattr(model, "name_or_path", "") or ""
    return None if not name or Path(name).exists() else name
