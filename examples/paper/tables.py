"""Tables and a plot of a protocol's results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
from cells import write_json
from protocol import UNSTEERED
from report import markdown

from yapo_peft import plot_dose_response
from yapo_peft.evaluation import Scores, cultural_scores

_CELL = ["country", "method", "multiplier"]


def write_tables(protocol: Any) -> Path:
    """Writes `tables.md`, `results.json` and `accuracy.png` to the folder of results; returns the first."""
    choices = _choices(protocol)
    table = _measures(protocol, choices)
    write_json(protocol.out / "results.json", json.loads(table.to_json(orient="records")))
    every = pd.DataFrame([_shown(row) for row in table.to_dict("records")])
    text = (
        f"## RCA in % by method and country\n\n{markdown(_by_country(table))}\n\n## All measures\n\n{markdown(every)}\n"
    )
    (protocol.out / "tables.md").write_text(text, "utf-8")
    plot_dose_response(_over_countries(choices), protocol.out / "accuracy.png", "Cultural questions of all countries")
    return protocol.out / "tables.md"


def _choices(protocol: Any) -> Scores:
    """The accuracy on each question."""
    parts = []
    for cell in protocol.cells():
        for kind in cell.country.questions:
            table = Scores.load(cell.folder / f"{kind}.json").table[["multiplier", "example", "accuracy"]]
            parts.append(_labelled(Scores(table, ("accuracy",)), cell).labelled(localization_status=kind))
    return Scores.concat(parts)


def _measures(protocol: Any, choices: Scores) -> pd.DataFrame:
    """A row per country, method and multiplier, with the bounds of 95 % intervals."""
    table = cultural_scores(choices)
    summary = choices.summary()
    for kind in ("localized", "nonlocalized"):
        found = summary[summary["localization_status"] == kind]
        bounds = found.rename(columns={f"accuracy_{end}": f"{kind}_{end}" for end in ("low", "high")})
        table = table.merge(bounds[[*_CELL, f"{kind}_low", f"{kind}_high"]], on=_CELL)
    if protocol.config.get("judge"):
        judged = [_labelled(Scores.load(cell.folder / "judge.json"), cell) for cell in protocol.cells()]
        found = Scores.concat(judged).summary().rename(columns=lambda name: name.replace("score", "judge"))
        table = table.merge(found.drop(columns="examples"), on=_CELL)
    if protocol.tasks:
        known = [_labelled(_over_tasks(Scores.load(protocol.knowledge_file(cell))), cell) for cell in protocol.cells()]
        found = Scores.concat(known).summary().rename(columns=lambda name: name.replace("acc", "knowledge"))
        table = table.merge(found.drop(columns="examples"), on=_CELL)
    return table


def _labelled(scores: Scores, cell: Any) -> Scores:
    return scores.labelled(country=cell.country.name, method=cell.method.name, seed=cell.seed)


def _over_tasks(scores: Scores) -> Scores:
    """The documents of all tasks as those of one."""
    table = scores.table
    example = table.groupby(["task", "example"], sort=False).ngroup()
    return Scores(table.assign(example=example).drop(columns="task"), scores.metrics)


def _over_countries(choices: Scores) -> Scores:
    """The questions of all countries and kinds as those of one, with the unsteered model as each method's start."""
    table = choices.table
    example = table.groupby(["country", "localization_status", "example"], sort=False).ngroup()
    table = table.assign(example=example).drop(columns=["country", "localization_status"])
    unsteered = table[table["method"] == UNSTEERED.name]
    methods = [name for name in table["method"].unique() if name != UNSTEERED.name]
    starts = [unsteered.assign(method=name) for name in methods]
    return Scores(pd.concat([*starts, table[table["method"] != UNSTEERED.name]], ignore_index=True), choices.metrics)


def _by_country(table: pd.DataFrame) -> pd.DataFrame:
    """RCA, a row per method and multiplier, a column per country."""
    rca = table.assign(rca=100 * table["rca"])
    wide = rca.pivot_table(index=["method", "multiplier"], columns="country", values="rca", sort=False)
    return wide[[*dict.fromkeys(table["country"])]].reset_index()


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the table as text: shares in %, with their intervals."""
    found: dict[str, Any] = {name: row[name] for name in _CELL}
    for name, unit in (
        ("localized", 100),
        ("nonlocalized", 100),
        ("rca", 100),
        ("pnlg", 1),
        ("judge", 1),
        ("knowledge", 100),
    ):
        if name in row:
            mean, low, high = (unit * row[key] for key in (name, f"{name}_low", f"{name}_high"))
            digits = 1 if unit == 100 else 2
            found[name] = f"{mean:.{digits}f} ({low:.{digits}f}, {high:.{digits}f})"
    return found
