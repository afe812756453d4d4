"""What the protocol reads: its config, and each country's training pairs and test questions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, concatenate_datasets

from yapo_peft import ConfigError, DatasetError
from yapo_peft.data import load_choices, load_pairs, load_prompts, load_rows, where
from yapo_peft.evaluation import MultipleChoice
from yapo_peft.evaluation.choice import last_boxed
from yapo_peft.evaluation.culture import LOCALIZED, NONLOCALIZED
from yapo_peft.evaluation.scores import distinct

# The space of each method's vector.
SPACES = {"yapo": "sae", "bipo": "dense", "caa": "dense", "sas": "sae"}
_TRAINED = ("yapo", "bipo")
# The kinds of questions by the names in the paper's data and in ours.
_KINDS = {"localized": LOCALIZED, "nonlocalized": NONLOCALIZED, "nolocalized": NONLOCALIZED}
_REQUIRED = ("model", "seeds", "countries", "data", "methods")
_OPTIONAL = ("train_on", "questions", "max_new_tokens", "batch_size", "training", "knowledge", "judge")
_DATA = ("train", "test", "pairs", "choices", "open_ended", "column", "generation")
_CHOICES = ("question", "options", "answer")


@dataclass(frozen=True)
class Method:
    """A method of the config; multiplier 0 alone stands for the unsteered model."""

    name: str
    multipliers: list[float]
    tau: float = 0.7
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def space(self) -> str:
        """The space of its vector, "sae" or "dense"."""
        return SPACES.get(self.name, "dense")

    @property
    def is_trained(self) -> bool:
        """Whether it is trained, so that its result depends on the seed."""
        return self.name in _TRAINED


UNSTEERED = Method("unsteered", [0.0])


@dataclass(frozen=True)
class Country:
    """The data of one country.

    Attributes:
        name: Its name in the data.
        pairs: Pairs to train on, without `rejected` if the model is to generate it.
        questions: Multiple-choice questions, by whether they name the country.
        prompts: Open-ended questions; None to ask none.
    """

    name: str
    pairs: Dataset
    questions: dict[str, Dataset]
    prompts: Dataset | None


def read_config(file: Path) -> tuple[dict[str, Any], list[Method]]:
    """Reads a config and its methods.

    Raises:
        ConfigError: A key is unknown or missing, or has a value that cannot work.
    """
    config = yaml.safe_load(file.read_text("utf-8")) or {}
    _require_keys("The config", config, _REQUIRED, _OPTIONAL)
    _require_keys("data", config["data"], _DATA[:4], _DATA[4:])
    _require_keys("pairs", config["data"]["pairs"], (), ("prompt", "chosen", "rejected"))
    choices = config["data"]["choices"]
    _require_keys("choices", choices, (), _CHOICES if "options" in choices else ("prompt", "chosen"))
    if config["model"] != "embedded":
        _require_keys("model", config["model"], ("name", "adapter"), ("dtype",))
    if config.get("judge"):
        _require_keys("judge", config["judge"], ("url",), ("model",))
    if config.get("judge") and "open_ended" not in config["data"]:
        raise ConfigError("judge: there are no open-ended answers to score; add open_ended to data, or drop judge.")
    if config.get("train_on", "both") not in (LOCALIZED, NONLOCALIZED, "both"):
        raise ConfigError(f"train_on={config['train_on']!r}: must be localized, nonlocalized or both.")
    for name in ("seeds", "countries", "methods"):
        if not config[name]:
            raise ConfigError(f"{name}={config[name]!r}: must have at least one.")
    methods = [_method(name, entry or {}) for name, entry in config["methods"].items()]
    return config, methods


def _method(name: str, entry: dict[str, Any]) -> Method:
    if name not in SPACES:
        raise ConfigError(
            f"methods: {name!r} is not known; use {', '.join(SPACES)}. The unsteered model is always run."
        )
    own = {"sas": ("tau",), "caa": ()}.get(name, ("training",))
    _require_keys(name, entry, ("multipliers",), own)
    multipliers = distinct(entry["multipliers"])
    if 0 in multipliers:
        raise ConfigError(f"{name}: multipliers={multipliers} has 0, which is the unsteered model: leave it out.")
    return Method(name, **{**entry, "multipliers": multipliers})


def _require_keys(part: str, found: Any, required: Sequence[str], optional: Sequence[str]) -> None:
    known = [*required, *optional]
    if not isinstance(found, dict):
        raise ConfigError(f"{part}={found!r}: must be a mapping with {', '.join(known)}.")
    for name in found:
        if name not in known:
            near = get_close_matches(name, known, 1)
            meant = f" (did you mean {near[0]!r}?)" if near else ""
            raise ConfigError(f"{part} has {name!r}{meant}: it takes {', '.join(known)}.")
    for name in required:
        if name not in found:
            raise ConfigError(f"{part} lacks {name!r}: add it.")


def load_countries(config: dict[str, Any], folder: Path) -> list[Country]:
    """Loads the countries of a config.

    Args:
        config: As `read_config` returns it.
        folder: What paths of files are relative to.

    Raises:
        DatasetError: A country, column or kind of question is missing, or a country has no test question that is not
            also trained on.
    """
    data = config["data"]
    splits = {name: _with_kinds(_rows(data[name], folder), name) for name in ("train", "test")}
    return [_country(str(name), splits, config) for name in config["countries"]]


def _rows(entry: dict[str, Any], folder: Path) -> Dataset:
    entry = {"source": entry} if isinstance(entry, str) else entry
    _require_keys("data", entry, ("source",), ("split", "where"))
    sources = entry["source"] if isinstance(entry["source"], list) else [entry["source"]]
    options = {"split": entry["split"]} if "split" in entry else {}
    paths = [folder / source if (folder / source).exists() else source for source in sources]
    rows = concatenate_datasets([load_rows(path, **options) for path in paths])
    return where(rows, **entry["where"]) if entry.get("where") else rows


def _with_kinds(rows: Dataset, split: str) -> Dataset:
    """The rows with `localization_status` by our names."""
    if "localization_status" not in rows.column_names:
        raise DatasetError(f"The {split} rows have no column 'localization_status', but {rows.column_names}: add it.")
    found = rows["localization_status"]
    unknown = sorted({str(kind) for kind in found} - set(_KINDS))
    if unknown:
        raise DatasetError(f"The {split} rows have localization_status={unknown[0]!r}: must be one of {list(_KINDS)}.")
    kinds: Any = [_KINDS[kind] for kind in found]
    return rows.remove_columns("localization_status").add_column("localization_status", kinds)


def _country(name: str, splits: dict[str, Dataset], config: dict[str, Any]) -> Country:
    data, column = config["data"], config["data"].get("column", "country")
    train, test = (where(splits[split], **{column: name}) for split in ("train", "test"))
    if config.get("train_on", "both") != "both":
        train = where(train, localization_status=config["train_on"])
    columns = dict(data["pairs"])
    if columns.get("rejected") == "generate":
        columns["rejected"] = None
    pairs = load_pairs(train, **columns)
    trained = {row["prompt"][-1]["content"] for row in pairs}
    keep = [each for each in ("id", "localization_status") if each in test.column_names]
    if "options" in data["choices"]:
        asked, text = load_choices(test, keep=keep, **data["choices"]), _question
    else:
        asked, text = load_pairs(test, keep=keep, rejected=None, **data["choices"]), _prompt
    held_out = asked.select([place for place, row in enumerate(asked) if text(row) not in trained])
    if len(held_out) < len(asked):
        print(f"{name}: {len(asked) - len(held_out)} test questions are also trained on, and left out.")
    if not len(held_out):
        raise DatasetError(f"{name}: all test questions are also trained on: choose other rows to train on.")
    kinds = {kind: where(held_out, localization_status=kind) for kind in (LOCALIZED, NONLOCALIZED)}
    if "id" in keep:  # twins, in the same order, so that they are resampled together
        both = set.intersection(*(set(rows["id"]) for rows in kinds.values()))
        kinds = {kind: _by_id(where(rows, id=sorted(both))) for kind, rows in kinds.items()}
    kinds = {kind: _first(rows, config) for kind, rows in kinds.items()}
    return Country(name, pairs.shuffle(seed=0), kinds, _open_ended(test, config, trained))


def _open_ended(test: Dataset, config: dict[str, Any], trained: set[str]) -> Dataset | None:
    if "open_ended" not in config["data"]:
        return None
    prompts = load_prompts(test, prompt=config["data"]["open_ended"], keep=["localization_status"])
    prompts = prompts.select([place for place, row in enumerate(prompts) if _prompt(row) not in trained])
    parts = [_first(where(prompts, localization_status=kind), config) for kind in (LOCALIZED, NONLOCALIZED)]
    return concatenate_datasets(parts)


def _by_id(rows: Dataset) -> Dataset:
    ids = list(rows["id"])
    return rows.select(sorted(range(len(ids)), key=lambda place: ids[place]))


def _first(rows: Dataset, config: dict[str, Any]) -> Dataset:
    return rows.select(range(min(config.get("questions") or len(rows), len(rows))))


def _question(row: Any) -> str:
    return row["question"]


def _prompt(row: Any) -> str:
    return row["prompt"][-1]["content"]


class StatedChoice:
    r"""Generated answers to prompts that list their options, where `chosen` states the right one, as in the paper.

    Metric of an answer: `accuracy`, 1 if it states the same option: the last `\boxed{...}`, or the number or letter
    that it starts with. If `chosen` has neither, the answer has to contain its text.
    """

    def prompts(self, dataset: Any) -> list[Any]:
        """The prompts."""
        return dataset["prompt"]

    def score_answers(self, dataset: Any, examples: Sequence[int], answers: Sequence[str]) -> list[dict[str, float]]:
        """Metrics of answers."""
        found = []
        for example, answer in zip(examples, answers, strict=True):
            chosen = dataset[example]["chosen"][-1]["content"]
            right = stated(chosen)
            hit = stated(answer) == right if right else chosen.strip().casefold() in answer.casefold()
            found.append({"accuracy": float(hit)})
        return found


def stated(answer: str) -> str | None:
    r"""The option that an answer states: the last `\boxed{...}`, or the number or letter that it starts with."""
    boxed = last_boxed(answer)
    if boxed is not None:
        return boxed.casefold()
    start = re.match(r"\W*(\d+|[A-Za-z])(?=\W*$|\s*[.):])", answer)
    return start.group(1).casefold() if start else None


def choice_measure(questions: Dataset) -> Any:
    """By the likelihood of the options' texts; by generated answers, if the options are in the prompt."""
    return MultipleChoice("text", "characters") if "options" in questions.column_names else StatedChoice()
