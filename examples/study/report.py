"""Tables and plots of what the study has so far."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from cells import Method, write_json
from plots import Line, damage_lines, dose_lines, draw

from yapo_peft.evaluation import Scores, at_matched_damage, cultural_scores
from yapo_peft.evaluation.matched_damage import effects_at
from yapo_peft.evaluation.scores import by_seed_and_example, interval, mean_of_known, resampled_means

# Multipliers below 0 or not.
_SIDES = {"up": False, "down": True}


def write_report(study: Any) -> Path:
    """Writes `report/tables.md`, `results.json` and plots of the cells that are there; returns the folder."""
    folder = study.out / "report"
    folder.mkdir(exist_ok=True)
    effect, by_text = _together(study, "preference.json"), _together(study, "damage.json")
    if not effect.metrics or not by_text.metrics:
        raise SystemExit(f"{study.out} has no cell that is measured: there is nothing to report.")
    damage = _over_texts(by_text)
    gains = _gains(effect, damage)
    references = [name for name in study.config.get("references", []) if name in set(gains[0].table["method"])]
    doses, harm = effect.summary(), damage.summary()[["behaviour", "method", "multiplier", "kl"]]
    tables = {
        "Chosen settings": _settings(study),
        "Held-out loss during training": _losses(study),
        "At equal multiplier": _at_multiplier(doses, harm),
        "At equal damage": _at_damage(study.config["damage_levels"], *gains),
        **{f"Divided by {name}": _ratios(study.config["damage_levels"], *gains, name) for name in references},
        "Damage by text": _by_text(by_text),
        "Knowledge": _knowledge(study),
        "Culture": _culture(study),
    }
    tables = {title: table for title, table in tables.items() if len(table)}
    rows = {title: json.loads(table.to_json(orient="records")) for title, table in tables.items()}
    write_json(folder / "results.json", rows)
    text = [f"## {title}\n\n{markdown(table)}\n" for title, table in tables.items()]
    (folder / "tables.md").write_text("\n".join(text))
    draw(folder / "doses.png", study, "multiplier", "margin (nats)", dose_lines(doses))
    lines = damage_lines(gains[0], harm, most=1.2 * max(study.config["damage_levels"]))
    draw(folder / "matched.png", study, "KL from the base, signed (nats per token)", "margin gained (nats)", lines)
    if "Held-out loss during training" in tables:
        draw(folder / "losses.png", study, "step", "held-out loss (nats)", _loss_lines(study))
    return folder


def _cells(study: Any) -> Iterator[tuple[str, Method, int, Path]]:
    """Each cell of the behaviours that has been made, and its folder."""
    for behaviour in study.behaviours:
        for method in study.methods.values():
            for seed in study.config["seeds"]:
                folder = study.bench.folder(behaviour, method, seed)
                if folder.is_dir():
                    yield behaviour, method, seed, folder


def _log(folder: Path) -> list[dict[str, Any]]:
    """What the training of a cell logged."""
    return json.loads((folder / "log.json").read_text())["log"]


def _together(study: Any, file: str) -> Scores:
    found = [
        Scores.load(folder / file).labelled(behaviour=behaviour, method=method.name, seed=seed)
        for behaviour, method, seed, folder in _cells(study)
        if (folder / file).is_file()
    ]
    return Scores.concat(found) if found else Scores(pd.DataFrame(), ())


def _over_texts(damage: Scores) -> Scores:
    """The damage over all kinds of text, as chunks of one; the chunks of kinds are as many tokens."""
    kinds = {kind: place for place, kind in enumerate(damage.table["text"].unique())}
    example = damage.table["example"] + damage.table["text"].map(kinds) * (damage.table["example"].max() + 1)
    return Scores(damage.table.assign(example=example).drop(columns="text"), damage.metrics)


def _by_text(damage: Scores) -> pd.DataFrame:
    """The KL at multipliers -1 and +1 on each kind of text, the mean over seeds."""
    found = damage.summary()
    found = found[found["multiplier"].isin([-1, 1])]
    sign = found["multiplier"].map({-1: "at -1", 1: "at +1"})
    table = found.assign(column=found["text"] + ", " + sign)
    keys = ["behaviour", "method"]
    return table.pivot_table(index=keys, columns="column", values="kl", sort=False).reset_index()


def _settings(study: Any) -> pd.DataFrame:
    if not (study.out / "tuning.json").is_file():
        return pd.DataFrame()
    tuned = json.loads((study.out / "tuning.json").read_text())
    rows = [
        {
            "method": name,
            "setting": setting.replace("-", " ", 1),
            "gain on validation pairs": score,
            "chosen": "yes" if setting == getattr(study.methods.get(name), "setting", None) else "",
        }
        for name, scores in tuned.items()
        for setting, score in scores.items()
    ]
    return pd.DataFrame(rows)


def _losses(study: Any) -> pd.DataFrame:
    """Of each behaviour and trained method, the loss on validation pairs as training goes on, mean over seeds."""
    rows = []
    for behaviour, method, _, folder in _cells(study):
        if not method.is_trained:
            continue
        log = _log(folder)
        found = {f"step {entry['step']}": entry["eval_loss"] for entry in log if "eval_loss" in entry}
        last = next(entry for entry in reversed(log) if "code/nonzero" in entry)
        rows.append({"behaviour": behaviour, "method": method.name, **found, "entries": last["code/nonzero"]})
    if not rows:
        return pd.DataFrame()
    return pd.DataFrame(rows).groupby(["behaviour", "method"], sort=False).mean().reset_index()


def _at_multiplier(doses: pd.DataFrame, harm: pd.DataFrame) -> pd.DataFrame:
    """Margin and accuracy at -1, 0 and +1, with 95 % intervals, and the KL there."""
    found = doses[doses["multiplier"].isin([-1, 0, 1])].merge(
        harm, on=["behaviour", "method", "multiplier"], how="left"
    )
    rows = [
        {
            "behaviour": row.behaviour,
            "method": row.method,
            "multiplier": f"{row.multiplier:+.0f}" if row.multiplier else "0",
            "margin": f"{row.margin:+.1f} ({row.margin_low:+.1f}, {row.margin_high:+.1f})",
            "accuracy": f"{100 * row.accuracy:.0f} ({100 * row.accuracy_low:.0f}, {100 * row.accuracy_high:.0f})",
            "KL": "" if np.isnan(row.kl) else f"{row.kl:.3f}",
        }
        for row in found.itertuples()
    ]
    table = pd.DataFrame(rows)
    # Unsteered, all methods are the same model.
    base = table[table["multiplier"] == "0"].drop_duplicates("behaviour").assign(method="base", KL="")
    return pd.concat([base, table[table["multiplier"] != "0"]]).sort_values("behaviour", kind="stable")


def _gains(effect: Scores, damage: Scores) -> tuple[Scores, Scores]:
    """How far each pair's margin is from the base's, so that intervals are those of gains; of cells with a damage."""
    cell = ["behaviour", "method", "seed"]
    both = set(map(tuple, damage.table[cell].to_numpy())) & set(map(tuple, effect.table[cell].to_numpy()))
    effect, damage = (
        Scores(scores.table[[row in both for row in map(tuple, scores.table[cell].to_numpy())]], scores.metrics)
        for scores in (effect, damage)
    )
    return effect.gains("margin"), damage


def _at_damage(levels: list[float], gains: Scores, damage: Scores) -> pd.DataFrame:
    """How far each method moves the margin, up and down, at each level of damage: a row per behaviour and method."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for side, negative in _SIDES.items():
        table = at_matched_damage(gains, damage, levels, metric="gain", negative=negative)
        for row in table.to_dict("records"):
            labels = {name: row[name] for name in ("behaviour", "method")}
            value, low, high = (row[f"gain{end}"] for end in ("", "_low", "_high"))
            shown = "" if np.isnan(value) else f"{value:+.1f} ({low:+.1f}, {high:+.1f})"
            rows.setdefault(tuple(labels.values()), labels)[f"{side}, KL {row['kl']}"] = shown
    return pd.DataFrame(list(rows.values()))


def _ratios(levels: list[float], gains: Scores, damage: Scores, reference: str) -> pd.DataFrame:
    """Mean gains at each level of damage, divided by another method's on the same pairs and seeds, with intervals."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for side, negative in _SIDES.items():
        table = effects_at(levels, gains, damage, "gain", "kl", negative).table
        for (behaviour, level), part in table.groupby(["behaviour", "kl"], sort=False):
            of = {name: group for name, group in part.groupby("method", sort=False)}
            for name in [name for name in of if name != reference and reference in of]:
                seeds = set(of[name]["seed"]) & set(of[reference]["seed"])
                both = [by_seed_and_example(g[g["seed"].isin(seeds)], "gain") for g in (of[name], of[reference])]
                value = mean_of_known(both[0]) / mean_of_known(both[1])
                # The same resamples for both.
                low, high = interval(np.divide(*(resampled_means(matrix, 4000, 0) for matrix in both)), 0.95)
                row = rows.setdefault((behaviour, name), {"behaviour": behaviour, "method": name})
                row[f"{side}, KL {level}"] = "" if np.isnan(value) else f"{value:.2f} ({low:.2f}, {high:.2f})"
    return pd.DataFrame(list(rows.values()))


def _knowledge(study: Any) -> pd.DataFrame:
    """How many points of accuracy, and nats of the right answer, are lost at -1 and +1, with paired intervals."""
    rows = []
    for behaviour, method, seed, folder in _cells(study):
        if seed != study.config["seeds"][0] or not (folder / "knowledge.json").is_file():
            continue
        table = Scores.load(folder / "knowledge.json").table
        row: dict[str, Any] = {"behaviour": behaviour, "method": method.name}
        for metric, name, unit in (("accuracy", "points", 100), ("right", "nats", 1)):
            values = unit * table.pivot_table(index="example", columns="multiplier", values=metric)
            row |= {f"base, {name}": f"{values[0.0].mean():.3g}"}
            steered = [multiplier for multiplier in (-1.0, 1.0) if multiplier in values]
            row |= {f"{name} at {sign:+.0f}": _change(values[sign] - values[0.0]) for sign in steered}
        rows.append(row)
    return pd.DataFrame(rows).fillna("")


def _change(differences: pd.Series) -> str:
    """A mean of paired differences, and its interval."""
    table = pd.DataFrame({"multiplier": 1.0, "example": differences.index, "change": differences.to_numpy()})
    row = Scores(table, ("change",)).summary().iloc[0]
    return f"{row['change']:+.2g} ({row['change_low']:+.2g}, {row['change_high']:+.2g})"


def _culture(study: Any) -> pd.DataFrame:
    """RCA and PNLG of each country, method and multiplier."""
    found = []
    entry = study.config.get("culture", {"files": {}})
    for country in entry["files"]:
        # Those of which a setting is chosen.
        for name in [name for name in entry["methods"] if name in study.methods]:
            method = study.methods[name]
            folder = study.bench.folder(f"culture of {country}", method, study.config["seeds"][0])
            files = {status: folder / f"{status}.json" for status in ("localized", "nonlocalized")}
            if all(file.is_file() for file in files.values()):
                for status, file in files.items():
                    labels = {"country": country, "method": name, "localization_status": status}
                    found.append(Scores.load(file).labelled(**labels))
    return cultural_scores(Scores.concat(found)) if found else pd.DataFrame()


def markdown(table: pd.DataFrame) -> str:
    rows = [[*table.columns], ["---"] * len(table.columns), *table.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(map(_cell, row)) + " |" for row in rows)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def _loss_lines(study: Any) -> list[Line]:
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    for behaviour, method, _, folder in _cells(study):
        if method.is_trained and method.training.get("loss_type") is None:
            for entry in _log(folder):
                if "eval_loss" in entry:
                    found.setdefault((behaviour, method.name), {}).setdefault(entry["step"], []).append(
                        entry["eval_loss"]
                    )
    return [
        (behaviour, name, [(step, float(np.mean(v)), min(v), max(v)) for step, v in sorted(points.items())])
        for (behaviour, name), points in found.items()
    ]
