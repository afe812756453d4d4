"""Multiple-choice questions, and preference pairs created from them."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

from datasets import Dataset

from .._utils import choice
from ..errors import ConfigError, DatasetError
from .sources import as_message, load_rows, require_columns, require_free

AnswerForm = Literal["text", "letter"]
Wrong = Literal["random", "each"]
_COLUMNS = ("question", "options", "answer")


def letters(count: int) -> list[str]:
    """Returns the first `count` letters: A, B, C, ... Raises `ConfigError` for more than 26."""
    if count > len(string.ascii_uppercase):
        raise ConfigError(f"{count} options: at most {len(string.ascii_uppercase)} are supported, one per letter.")
    return list(string.ascii_uppercase[:count])


def choice_prompt(question: str, options: Sequence[str], form: str = "letter") -> str:
    """Returns the prompt of a question: the question alone for form="text", followed by its options for "letter"."""
    choice(get_args(AnswerForm), form=form)
    if form == "text":
        return question
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(letters(len(options)), options, strict=True))
    return f"{question}\n{listed}\nAnswer with the letter of the right option only."


def load_choices(
    source: str | Path | Dataset,
    *,
    question: str = "question",
    options: str = "options",
    answer: str = "answer",
    keep: list[str] | None = None,
    split: str = "train",
    **load_options: Any,
) -> Dataset:
    """Loads multiple-choice questions, with the columns `question`, `options` and `answer` (an index).

    Args:
        source: As for `load_rows`.
        question: Column with the questions.
        options: Column with the options, a list of texts.
        answer: Column with the correct option, as its index (from 0), letter or text.
        keep: Other columns to keep.
        split: As for `load_rows`.
        **load_options: For `datasets.load_dataset`.

    Raises:
        ConfigError: `keep` has the name of a created column.
        DatasetError: A column is missing, or a row has fewer than two options, duplicate options, or an answer that is
            not among them.
    """
    require_free(keep or [], _COLUMNS)
    rows = load_rows(source, split, **load_options)
    require_columns(rows, [question, options, answer, *(keep or [])])
    found: list[dict[str, Any]] = []
    for index, row in enumerate(rows):
        row = dict(row)
        texts = row[options]
        if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(t, str) and t.strip() for t in texts):
            raise DatasetError(
                f"Row {index} has {options}={texts!r}: must be a list of at least two non-empty strings."
            )
        if len(set(texts)) < len(texts):
            raise DatasetError(f"Row {index} has duplicate options: {texts!r}; remove them.")
        if not isinstance(row[question], str) or not row[question].strip():
            raise DatasetError(f"Row {index} has {question}={row[question]!r}: must be a non-empty string.")
        right = _index_of(row[answer], texts, index, answer)
        kept = {name: row[name] for name in keep or []}
        found.append({"question": row[question], "options": texts, "answer": right, **kept})
    if not found:
        raise DatasetError("The dataset has no questions.")
    return Dataset.from_list(found)


def choice_pairs(
    dataset: Dataset, *, form: str = "text", wrong: str = "random", seed: int = 0, chat: bool = True
) -> Dataset:
    """Creates preference pairs from multiple-choice questions: the correct option is chosen, a wrong one rejected.

    Args:
        dataset: Questions as `load_choices` takes them, in its columns.
        form: Whether answers are the "text" of an option, or its "letter", with the options in the prompt.
        wrong: Whether to use a "random" wrong option, or to create a pair for "each".
        seed: Seed of the random options.
        chat: Whether to create messages, for chat models, instead of texts.

    Returns:
        The pairs, with the dataset's other columns.

    Raises:
        ConfigError: An argument is invalid, or a column has the name of a created one.
        DatasetError: As `load_choices`.
    """
    require_free(dataset.column_names, ["prompt", "chosen", "rejected"])
    choice(get_args(Wrong), wrong=wrong)
    dataset = load_choices(dataset, keep=[name for name in dataset.column_names if name not in _COLUMNS])
    draw = random.Random(seed)
    pairs: list[dict[str, Any]] = []
    for row in dataset:
        row = dict(row)
        question, options, right = row.pop("question"), row.pop("options"), row.pop("answer")
        answers = letters(len(options)) if form == "letter" else options
        others = [index for index in range(len(options)) if index != right]
        for index in others if wrong == "each" else [draw.choice(others)]:
            texts = {"prompt": choice_prompt(question, options, form)}
            texts |= {"chosen": answers[right], "rejected": answers[index]}
            cells = {name: as_message(name, text) for name, text in texts.items()} if chat else texts
            pairs.append(cells | row)
    return Dataset.from_list(pairs)


def _index_of(answer: Any, options: list[str], row: int, column: str) -> int:
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options):
        return answer
    if isinstance(answer, str):
        names = letters(len(options))
        text = options.index(answer) if answer in options else None
        letter = names.index(answer.strip().upper()) if answer.strip().upper() in names else None
        if text is not None and letter is not None and text != letter:
            raise DatasetError(
                f"Row {row} has {column}={answer!r}, the text of option {names[text]} but the letter of another one: "
                "use the index, from 0."
            )
        if text is not None or letter is not None:
            return cast(int, text if text is not None else letter)
    raise DatasetError(
        f"Row {row} has {column}={answer!r}, which is not one of its {len(options)} options: must be an index from 0, "
        "a letter, or the option's text."
    )
