"""Multiple-choice questions, and preference pairs made of them."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

from datasets import Dataset

from ..errors import ConfigError, DatasetError
from .sources import load_rows, require_columns

AnswerForm = Literal["text", "letter"]
Wrong = Literal["random", "each"]


def letters(count: int) -> list[str]:
    """The letters that name so many options: A, B, C, ...

    Raises:
        ConfigError: There are more options than letters.
    """
    if count > len(string.ascii_uppercase):
        raise ConfigError(f"{count} options: there are letters for {len(string.ascii_uppercase)}.")
    return list(string.ascii_uppercase[:count])


def choice_prompt(question: str, options: Sequence[str], form: str = "letter") -> str:
    """A question as the model sees it: alone, if it is to be answered by the text of an option, or with its options.

    Raises:
        ConfigError: `form` is neither "letter" nor "text".
    """
    if form not in get_args(AnswerForm):
        raise ConfigError(f"form={form!r}: choose one of {', '.join(map(repr, get_args(AnswerForm)))}.")
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
    """Reads multiple-choice questions and gives them the columns `question`, `options` and `answer`, an index.

    Args:
        source: As for `load_rows`.
        question: Column of the questions.
        options: Column of the options, a list of texts each.
        answer: Column of the right ones: an index from 0 on, a letter, or the text of the option.
        keep: Other columns to keep.
        split: As for `load_rows`.
        **load_options: For `datasets.load_dataset`.

    Raises:
        ConfigError: `keep` names a column of the questions.
        DatasetError: A column is missing, or a row has less than two options, the same one twice, or an answer that is
            none of them.
    """
    taken = sorted(set(keep or []) & {"question", "options", "answer"})
    if taken:
        raise ConfigError(f"keep={keep!r}: {taken[0]!r} is a column of the questions themselves; rename the other one.")
    rows = load_rows(source, split, **load_options)
    require_columns(rows, [question, options, answer, *(keep or [])])
    found: list[dict[str, Any]] = []
    for index, row in enumerate(rows):
        row = dict(row)
        texts = row[options]
        if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(t, str) and t.strip() for t in texts):
            raise DatasetError(f"Row {index} has {options}={texts!r}: give a list of two texts at least.")
        if len(set(texts)) < len(texts):
            raise DatasetError(f"Row {index} has an option twice: {texts!r}.")
        if not isinstance(row[question], str) or not row[question].strip():
            raise DatasetError(f"Row {index} has {question}={row[question]!r}: give a text.")
        right = _index_of(row[answer], texts, index, answer)
        kept = {name: row[name] for name in keep or []}
        found.append({"question": row[question], "options": texts, "answer": right, **kept})
    if not found:
        raise DatasetError("The dataset is empty: there is no question in it.")
    return Dataset.from_list(found)


def choice_pairs(dataset: Dataset, *, form: str = "text", wrong: str = "random", seed: int = 0) -> Dataset:
    """Preference pairs of multiple-choice questions: the right option is chosen, a wrong one rejected.

    Args:
        dataset: What `load_choices` returned.
        form: Whether answers are the "text" of options, or a "letter" to a question that lists them.
        wrong: One wrong option at "random", or a pair for "each".
        seed: Of the random ones.

    Returns:
        Conversational pairs, with the dataset's other columns.

    Raises:
        ConfigError: An argument has a value that cannot work.
        DatasetError: A column is missing.
    """
    require_columns(dataset, ["question", "options", "answer"])
    taken = sorted(set(dataset.column_names) & {"prompt", "chosen", "rejected"})
    if taken:
        raise ConfigError(f"The questions have a column {taken[0]!r}, which the pairs would replace: rename it first.")
    if wrong not in get_args(Wrong):
        raise ConfigError(f"wrong={wrong!r}: choose one of {', '.join(map(repr, get_args(Wrong)))}.")
    draw = random.Random(seed)
    pairs: list[dict[str, Any]] = []
    for row in dataset:
        row = dict(row)
        question, options, right = row.pop("question"), row.pop("options"), row.pop("answer")
        answers = letters(len(options)) if form == "letter" else options
        others = [index for index in range(len(options)) if index != right]
        for index in others if wrong == "each" else [draw.choice(others)]:
            pairs.append(
                {
                    "prompt": [{"role": "user", "content": choice_prompt(question, options, form)}],
                    "chosen": [{"role": "assistant", "content": answers[right]}],
                    "rejected": [{"role": "assistant", "content": answers[index]}],
                    **row,
                }
            )
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
                f"Row {row} has {column}={answer!r}, the text of option {names[text]} and the letter of another one: "
                "give the index, from 0 on."
            )
        if text is not None or letter is not None:
            return cast(int, text if text is not None else letter)
    raise DatasetError(
        f"Row {row} has {column}={answer!r}, which is none of its {len(options)} options: give an index from 0 on, a "
        "letter, or the option's text."
    )
