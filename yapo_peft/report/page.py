"""The page: one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import ModelCard
from torch import nn

from .._utils import replacing
from ..adapter_file.card import add_findings
from ..errors import ConfigError
from ..evaluation import plot_dose_response
from . import pictures
from .contents import ReportContents, collect_report
from .marking import marked_tokens

PICTURE = "dose-response.png"


def write_report(
    model: nn.Module, path: str | Path, dataset: Iterable[dict[str, Any]], *args: Any, **options: Any
) -> Path:
    """Measures an adapter, and writes what was found as one HTML file without a need for a network.

    Args:
        model: A `PeftModel` with a YaPO adapter.
        path: The file, ending in ".html"; a failure leaves what was there.
        dataset: Preference pairs.
        *args: As of `collect_report`.
        **options: As of `collect_report`.

    Returns:
        The path.

    Raises:
        ConfigError: As `collect_report`, or the path does not end in ".html".
        ImportError: matplotlib or jinja2 is not installed.
    """
    require_page(Path(path))
    return save_page(collect_report(model, dataset, *args, **options), path)


def save_page(contents: ReportContents, path: str | Path) -> Path:
    """As `write_report`, of what `collect_report` returned."""
    path, page = Path(path), render_report(contents)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return path


def write_short_form(contents: ReportContents, folder: str | Path) -> Path:
    """Puts the first features and a picture of the dose-response into the card of a saved adapter.

    What else its `README.md` says stays. `model.push_to_hub`, `yapo push` and `hf upload` send both files along.

    Args:
        contents: What `collect_report` returned.
        folder: A folder that `save_pretrained` or a trainer wrote.

    Returns:
        Path of the card.

    Raises:
        ConfigError: There is no adapter with a card in the folder.
        ImportError: matplotlib is not installed.
    """
    file = require_card(folder)
    picture = plot_dose_response(
        contents.preference, file.with_name(PICTURE), contents.title, metrics=["accuracy", "margin"]
    )
    card = add_findings(ModelCard.load(file), features=_by_contribution(contents), picture=picture.name)
    with replacing(file) as partial:
        card.save(partial)
    return file


def require_card(folder: str | Path) -> Path:
    """The card of a saved adapter.

    Raises:
        ConfigError: There is none.
    """
    file = Path(folder) / "README.md"
    if not file.is_file():
        raise ConfigError(f"There is no {file}: give the folder of a saved adapter, which has a card.")
    return file


def require_page(path: Path) -> None:
    """Raises before any work if a page could not be written."""
    if path.suffix != ".html":
        raise ConfigError(f"path={str(path)!r}: a report is an HTML file, so give a name that ends in '.html'.")
    if path.is_dir():
        raise ConfigError(f"path={str(path)!r} is a folder: name a file.")
    if find_spec("matplotlib") is None or find_spec("jinja2") is None:
        raise ImportError("Reports need matplotlib and jinja2: pip install 'yapo-peft[report]'.")


def render_report(contents: ReportContents) -> str:
    """The page of a report, as HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("yapo_peft.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["visible"] = visible
    environment.filters["number"] = number
    attribution, knowledge = contents.attribution, contents.knowledge
    return environment.get_template("page.html").render(
        contents=contents,
        doses=pictures.dose_response(contents.preference, ("margin", "accuracy"), "preference pairs"),
        damage=pictures.dose_response(contents.damage, ("kl", "top_changed"), "running text"),
        knowledge=pictures.dose_response(knowledge, ("accuracy",), "questions") if knowledge is not None else [],
        losses=pictures.losses(contents.history),
        bars=None if attribution is None else pictures.attribution_bars(attribution.features),
        multipliers=_multipliers(contents),
        features=_features(contents),
        answers=_by_prompt(contents.answers),
    )


def visible(token: str) -> str:
    """A token with its spaces and line ends to be seen."""
    return token.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")


def number(value: float | None, digits: int = 3, signed: bool = False) -> str:
    """A number as people read it; nothing where there is none."""
    if value is None or pd.isna(value):
        return ""
    return f"{value:{'+' if signed else ''}.{digits}g}"


def _multipliers(contents: ReportContents) -> list[dict[str, Any]]:
    """A row per multiplier: what it does to preferences, and what that costs."""
    rows = contents.preference.summary().merge(contents.damage.summary(), on="multiplier")
    if contents.knowledge is not None:
        known = contents.knowledge.summary()
        known = pd.DataFrame({"multiplier": known["multiplier"], "knowledge": known["accuracy"]})
        rows = rows.merge(known, on="multiplier")
    rows = rows.sort_values("multiplier")
    return [{str(key): value for key, value in row.items()} for row in rows.to_dict("records")]


def _features(contents: ReportContents) -> list[dict[str, Any]]:
    """A row per feature: what it is, what it contributes, and where it is on."""
    rows = [{str(key): value for key, value in row.items()} for row in _by_contribution(contents).to_dict("records")]
    passages: dict[tuple[int, int | None], list[str]] = {}
    for passage in contents.passages.to_dict("records"):
        passages.setdefault(_key(passage), []).append(marked_tokens(passage["tokens"], passage["values"]))
    said = [{name: row[name] if isinstance(row[name], str) else None for name in ("label", "link")} for row in rows]
    return [{**row, **own, "passages": passages.get(_key(row), [])} for row, own in zip(rows, said, strict=True)]


def _by_contribution(contents: ReportContents) -> pd.DataFrame:
    """The features with what they contribute, `left_out` and `integrated`; those of the largest contribution first."""
    table = contents.features.assign(left_out=float("nan"), integrated=float("nan"))
    if contents.attribution is None:
        return table
    known = {_key(row): row for row in contents.attribution.features.to_dict("records")}
    for column in ("left_out", "integrated"):
        table[column] = [known.get(_key(row), {}).get(column, float("nan")) for row in table.to_dict("records")]
    contribution = pd.DataFrame({"nats": table["left_out"].fillna(table["integrated"]).abs()})
    order = contribution.sort_values("nats", ascending=False, kind="stable").index
    return table.loc[order].reset_index(drop=True)


def _key(row: dict[Any, Any]) -> tuple[int, int | None]:
    return int(row["layer"]), None if pd.isna(row["feature"]) else int(row["feature"])


def _by_prompt(answers: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in answers:
        found.setdefault(row["prompt"], []).append(row)
    return found
