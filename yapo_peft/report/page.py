"""Renders a report as one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import pandas as pd
from huggingface_hub import ModelCard
from torch import nn

from .._utils import replacing
from ..adapter_file.card import add_findings
from ..errors import ConfigError
from ..evaluation import plot_dose_response
from . import plots
from .contents import ReportContents, collect_report
from .marking import marked_tokens

PLOT = "dose-response.png"


def write_report(
    model: nn.Module, path: str | Path, dataset: Iterable[dict[str, Any]], *args: Any, **options: Any
) -> Path:
    """Measures an adapter and writes an HTML report, which works offline.

    Args:
        model: A `PeftModel` with a YaPO adapter.
        path: The file, ending in ".html"; it is not changed on failure.
        dataset: Preference pairs.
        *args: As of `collect_report`.
        **options: As of `collect_report`.

    Returns:
        The path.

    Raises:
        ConfigError: As `collect_report`, or the path does not end in ".html".
        ImportError: matplotlib is not installed.
    """
    require_page(Path(path))
    return save_page(collect_report(model, dataset, *args, **options), path)


def save_page(contents: ReportContents, path: str | Path) -> Path:
    """As `write_report`, with the contents of `collect_report`."""
    path, page = Path(path), render_report(contents)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return path


def write_short_form(contents: ReportContents, folder: str | Path) -> Path:
    """Adds the top features and a plot of the dose-response to the model card of a saved adapter.

    The rest of `README.md` is kept. `model.push_to_hub`, `yapo push` and `hf upload` upload both files.

    Args:
        contents: The contents of `collect_report`.
        folder: A folder written by `save_pretrained` or a trainer.

    Returns:
        Path of the card.

    Raises:
        ConfigError: The folder has no model card.
        ImportError: matplotlib is not installed.
    """
    file = require_card(folder)
    plot = plot_dose_response(contents.preference, file.with_name(PLOT), contents.title, metrics=["accuracy", "margin"])
    card = add_findings(ModelCard.load(file), features=_by_contribution(contents), plot=plot.name)
    with replacing(file) as partial:
        card.save(partial)
    return file


def require_card(folder: str | Path) -> Path:
    """The model card of a saved adapter. Raises `ConfigError` if there is none."""
    file = Path(folder) / "README.md"
    if not file.is_file():
        raise ConfigError(f"There is no {file}: pass the folder of a saved adapter.")
    return file


def require_page(path: Path) -> None:
    """Raises before any work if a report could not be written."""
    if path.suffix != ".html":
        raise ConfigError(f"path={str(path)!r}: must end in '.html'.")
    if path.is_dir():
        raise ConfigError(f"path={str(path)!r} is a folder: pass a file.")
    if find_spec("matplotlib") is None:
        raise ImportError("Reports need matplotlib: pip install 'yapo-peft[report]'.")


def render_report(contents: ReportContents) -> str:
    """Renders a report as HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("yapo_peft.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["visible"] = visible
    environment.filters["number"] = number
    attribution, knowledge = contents.attribution, contents.knowledge
    return environment.get_template("page.html").render(
        contents=contents,
        doses=plots.dose_response(contents.preference, ("margin", "accuracy"), "preference pairs"),
        damage=plots.dose_response(contents.damage, ("kl", "top_changed"), "running text"),
        knowledge=plots.dose_response(knowledge, ("accuracy",), "questions") if knowledge is not None else [],
        losses=plots.losses(contents.history),
        bars=None if attribution is None else plots.attribution_bars(attribution.features),
        multipliers=_multipliers(contents),
        features=_features(contents),
        answers=_by_prompt(contents.answers),
    )


def visible(token: str) -> str:
    """A token with visible whitespace."""
    return token.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")


def number(value: float | None, digits: int = 3, signed: bool = False) -> str:
    """A formatted number; empty for None and NaN."""
    if value is None or pd.isna(value):
        return ""
    return f"{value:{'+' if signed else ''}.{digits}g}"


def _multipliers(contents: ReportContents) -> list[dict[str, Any]]:
    """One row per multiplier: effects and side effects."""
    rows = contents.preference.summary().merge(contents.damage.summary(), on="multiplier")
    if contents.knowledge is not None:
        known = contents.knowledge.summary().rename(columns={"accuracy": "knowledge"})
        rows = rows.merge(known[["multiplier", "knowledge"]], on="multiplier")
    return cast(Any, rows.sort_values("multiplier").to_dict("records"))


def _features(contents: ReportContents) -> list[dict[str, Any]]:
    """One row per feature: its properties, contribution and passages."""
    passages: dict[tuple[int, int | None], list[str]] = {}
    for passage in contents.passages.to_dict("records"):
        passages.setdefault(_key(passage), []).append(marked_tokens(passage["tokens"], passage["values"]))
    table = _by_contribution(contents).astype(object)
    rows = table.where(table.notna(), None).to_dict("records")
    return [{**cast(Any, row), "passages": passages.get(_key(row), [])} for row in rows]


def _by_contribution(contents: ReportContents) -> pd.DataFrame:
    """The features with their contributions `left_out` and `integrated`, the largest first."""
    if contents.attribution is None:
        return contents.features.assign(left_out=float("nan"), integrated=float("nan"))
    known = contents.attribution.features[["layer", "feature", "left_out", "integrated"]]
    table = contents.features.merge(known, on=["layer", "feature"], how="left")
    table["nats"] = table["left_out"].fillna(table["integrated"]).abs()
    return table.sort_values("nats", ascending=False, kind="stable", ignore_index=True)


def _key(row: dict[Any, Any]) -> tuple[int, int | None]:
    return int(row["layer"]), None if pd.isna(row["feature"]) else int(row["feature"])


def _by_prompt(answers: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in answers:
        found.setdefault(row["prompt"], []).append(row)
    return found
