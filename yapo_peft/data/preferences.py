"""Preference pairs in TRL's format."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..errors import ConfigError, DatasetError
from .sources import load_rows, require_columns, require_free

PAIR = ("prompt", "chosen", "rejected")
_ROLES = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}


def load_pairs(
    source: str | Path | Dataset,
    *,
    prompt: str | None = "prompt",
    chosen: str = "chosen",
    rejected: str | None = "rejected",
    chat: bool = True,
    keep: list[str] | None = None,
    split: str = "train",
    **options: Any,
) -> Dataset:
    """Loads preference pairs with TRL's columns `prompt`, `chosen` and `rejected`.

    BiPO's files are `load_pairs("train.csv", prompt="question", chosen="matching", rejected="not_matching")`.

    Args:
        source: As for `load_rows`.
        prompt: Column of the prompts, as texts or lists of messages; None if `chosen` and `rejected` start with them.
        chosen: Column of the answers to prefer; of conversations that start with the prompt, what follows it is taken.
        rejected: Column of the other answers; None if there are none, as `generate_rejected` makes them.
        chat: Whether texts become messages of a user and an assistant, as a chat model wants them; False keeps them.
        keep: Other columns to keep.
        split: As for `load_rows`.
        **options: For `datasets.load_dataset`.

    Returns:
        The pairs. Those without a prompt or an answer, and those whose answers are the same, are left out, with a
        warning that counts them.

    Raises:
        ConfigError: Neither `prompt` nor `rejected` is named, or `keep` names a column of the pairs.
        DatasetError: A column is missing, holds neither texts nor messages, an answer is a conversation that starts
            otherwise than its prompt, or no pair is left.
    """
    if prompt is None and rejected is None:
        raise ConfigError("prompt=None, rejected=None: a prompt is what two answers both start with; name its column.")
    require_free(keep or [], PAIR)
    rows = load_rows(source, split, **options)
    names = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    columns = {ours: theirs for ours, theirs in names.items() if theirs is not None}
    require_columns(rows, [*columns.values(), *(keep or [])])
    if prompt is None and rejected is not None:
        rows = _with_prompts(rows.select_columns([chosen, rejected, *(keep or [])]), chosen, rejected)
        columns = {name: name for name in PAIR}
    pairs: list[dict[str, Any]] = []
    empty: list[int] = []
    same: list[int] = []
    for index, row in enumerate(rows):
        row = dict(row)
        cells = {ours: _cell(row[theirs], ours, index, chat) for ours, theirs in columns.items()}
        if chat:
            cells = _without_prompts(cells, index)
        if not all(map(_says_something, cells.values())):
            empty.append(index)
        elif cells["chosen"] == cells.get("rejected"):
            same.append(index)
        else:
            pairs.append({**cells, **{name: row[name] for name in keep or []}})
    _say_what_is_left_out(len(rows), len(pairs), {"without a prompt or an answer": empty, "with equal answers": same})
    return Dataset.from_list(pairs)


def with_system_prompt(dataset: Dataset, system_prompt: str, *, as_user: bool = False) -> Dataset:
    """The same pairs or prompts, each behind a system prompt: what steering is to be compared with.

    Args:
        dataset: With a column `prompt`, of messages or texts.
        system_prompt: What the system says; before a text it is a paragraph of its own.
        as_user: Put it before the first message's text instead, for chat templates without a system role, such as
            Gemma 2's.

    Raises:
        DatasetError: There is no column `prompt`, or a prompt has a system message already.
    """
    require_columns(dataset, ["prompt"])

    def add(row: dict[str, Any]) -> dict[str, Any]:
        prompt = row["prompt"]
        if isinstance(prompt, str):
            return {"prompt": f"{system_prompt}\n\n{prompt}"}
        if prompt and prompt[0]["role"] == "system":
            raise DatasetError(f"A prompt has a system message already: {prompt[0]['content']!r}.")
        if as_user:
            first = {**prompt[0], "content": f"{system_prompt}\n\n{prompt[0]['content']}"}
            return {"prompt": [first, *prompt[1:]]}
        return {"prompt": [{"role": "system", "content": system_prompt}, *prompt]}

    return dataset.map(add, desc="Adding the system prompt")


def _with_prompts(rows: Dataset, chosen: str, rejected: str) -> Dataset:
    """The pairs with what both answers start with as their prompt, as TRL finds it."""
    from trl import extract_prompt

    both = rows.filter(lambda row: bool(row[chosen]) and bool(row[rejected]), desc="Leaving out empty answers")
    renamed = both.rename_columns({old: new for old, new in ((chosen, "chosen"), (rejected, "rejected")) if old != new})
    return renamed.map(extract_prompt, desc="Finding prompts")


def _without_prompts(cells: dict[str, Any], index: int) -> dict[str, Any]:
    """Messages whose answers do not say the prompt again, as those of whole conversations do."""
    prompt, found = cells["prompt"], dict(cells)
    for name in ("chosen", "rejected"):
        answer = found.get(name) or []
        start = [(message["role"], message["content"].strip()) for message in answer[: len(prompt)]]
        if prompt and start == [(message["role"], message["content"].strip()) for message in prompt]:
            found[name] = answer[len(prompt) :]
        elif answer and answer[0]["role"] in ("user", "system"):
            raise DatasetError(
                f"Row {index} has {name} starting with a message of the {answer[0]['role']}, which is not its prompt: "
                "give the answer alone, or the conversation with prompt=None."
            )
    return found


def _cell(value: Any, column: str, index: int, chat: bool) -> Any:
    """A cell as a text or as messages."""
    if value is None or isinstance(value, str):
        text = (value or "").strip() if chat else value or ""
        return [{"role": _ROLES[column], "content": text}] if chat else text
    is_messages = isinstance(value, list) and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in value)
    if not is_messages:
        raise DatasetError(
            f"Row {index} has {column}={value!r}: give a text, or a list of messages with 'role' and 'content'."
        )
    if not chat:
        raise DatasetError(f"Row {index} has messages in {column!r}: they are a chat, so leave chat=True.")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _says_something(cell: Any) -> bool:
    texts = [cell] if isinstance(cell, str) else [message["content"] for message in cell]
    return any(text and text.strip() for text in texts)


def _say_what_is_left_out(rows: int, pairs: int, reasons: dict[str, list[int]]) -> None:
    found = "; ".join(
        f"{len(indices)} {reason} (first in row {indices[0]})" for reason, indices in reasons.items() if indices
    )
    if not pairs:
        raise DatasetError(f"No preference pair is left of {rows} rows: {found or 'the dataset is empty'}.")
    if found:
        warnings.warn(f"{rows - pairs} of {rows} pairs are left out: {found}.", UserWarning, stacklevel=3)
