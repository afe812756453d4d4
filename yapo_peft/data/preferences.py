"""Loads preference pairs in TRL's format."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterable
from pathlib import Path
from string import Formatter
from typing import Any, cast

from datasets import Dataset

from ..errors import ConfigError, DatasetError
from ..scoring.pairs import text_of
from .sources import as_message, as_text, load_rows, require_columns, require_free

PAIR = ("prompt", "chosen", "rejected")
# Other names of these columns, which are found without being given: those of BiPO's files and of Deep-Culture-Lense.
_OTHER_NAMES = (("question", "matching", "not_matching"), ("prompt-mcq", "chosen-mcq", "rejected_*_mcq"))
# Columns beside the pair's that TRL's tokenization reads.
_READ_BY_TRL = ("tools", "chat_template_kwargs", "images", "image")


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

    Columns that are not named are also found by the names of BiPO's files (`question`, `matching`, `not_matching`) and
    of Deep-Culture-Lense (`prompt-mcq`, `chosen-mcq`, `rejected_<model>_mcq`). Answers without a column of prompts may
    start with theirs.

    Args:
        source: As for `load_rows`.
        prompt: Column with the prompts, as texts or messages; a template of several columns, such as
            "{context} {question}"; or None if `chosen` and `rejected` start with the prompt, which then ends where they
            first differ, as in TRL.
        chosen: Column with the preferred answers; a conversation that starts with the prompt is cut to what follows it.
        rejected: Column with the other answers; None if there are none yet, to create them with `generate_rejected`.
        chat: Whether to convert texts to user and assistant messages, for chat models.
        keep: Other columns to keep, besides those that TRL reads: `tools`, `chat_template_kwargs` and `images`.
        split: As for `load_rows`.
        **options: For `datasets.load_dataset`.

    Returns:
        The pairs. Pairs without a prompt or an answer, and those with equal answers, are left out, and a warning counts
        them.

    Raises:
        ConfigError: Both `prompt` and `rejected` are None, or `keep` has the name of a created column.
        DatasetError: A column is missing or has neither texts nor messages, an answer is a conversation with a
            different prompt, or no pair is left.
    """
    if prompt is None and rejected is None:
        raise ConfigError("prompt=None needs two answers, to find the prompt that both start with: pass rejected=.")
    require_free(keep or [], PAIR)
    rows = load_rows(source, split, **options)
    prompt, chosen, rejected = pair_columns(rows.column_names, prompt, chosen, rejected)
    if prompt is not None:
        rows, prompt = _with_template(rows, prompt)
    names = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    columns = {ours: theirs for ours, theirs in names.items() if theirs is not None}
    require_columns(rows, [*columns.values(), *(keep or [])])
    keep = _kept(rows, keep)
    if prompt is None and rejected is not None:
        rows = _with_prompts(rows.select_columns([chosen, rejected, *keep]), chosen, rejected)
        columns = {name: name for name in PAIR}
    pairs: list[dict[str, Any]] = []
    empty: list[int] = []
    same: list[int] = []
    for index, row in enumerate(rows):
        row = dict(row)
        cells = {ours: _cell(row[theirs], ours, index, chat) for ours, theirs in columns.items()}
        if chat:
            cells = _without_prompts(cells, index)
        if not all(map(_has_text, cells.values())):
            empty.append(index)
        elif cells["chosen"] == cells.get("rejected"):
            same.append(index)
        else:
            pairs.append({**cells, **{name: row[name] for name in keep}})
    _report_left_out(len(rows), len(pairs), {"without a prompt or an answer": empty, "with equal answers": same})
    return Dataset.from_list(pairs)


def load_prompts(
    source: str | Path | Dataset,
    *,
    prompt: str = "prompt",
    chat: bool = True,
    keep: list[str] | None = None,
    split: str = "train",
    **options: Any,
) -> Dataset:
    """Loads prompts alone, in the column `prompt`, such as questions to answer.

    Args:
        source: As for `load_rows`.
        prompt: Column with the prompts or a template, as for `load_pairs`; `question` and `prompt-mcq` are also found.
        chat: As for `load_pairs`.
        keep: Other columns to keep, besides those that TRL reads.
        split: As for `load_rows`.
        **options: For `datasets.load_dataset`.

    Raises:
        ConfigError: `keep` has the name of a created column.
        DatasetError: The column is missing, or a row has neither a text nor messages in it.
    """
    require_free(keep or [], ["prompt"])
    rows = load_rows(source, split, **options)
    if prompt == "prompt":
        prompt = next((name for name, *_ in (PAIR, *_OTHER_NAMES) if name in rows.column_names), prompt)
    rows, prompt = _with_template(rows, prompt)
    require_columns(rows, [prompt, *(keep or [])])
    kept = _kept(rows, keep)
    found: list[dict[str, Any]] = []
    for index, row in enumerate(cast(Iterable[dict[str, Any]], rows)):
        cell = _cell(row[prompt], "prompt", index, chat)
        if not _has_text(cell):
            raise DatasetError(f"Row {index} has no text in {prompt!r}: remove it.")
        found.append({"prompt": cell, **{name: row[name] for name in kept}})
    if not found:
        raise DatasetError("The dataset is empty: it has no prompts.")
    return Dataset.from_list(found)


def with_system_prompt(dataset: Dataset, system_prompt: str, *, as_user: bool = False) -> Dataset:
    """Adds a system prompt to each prompt, as a baseline for steering.

    Args:
        dataset: Rows with a column `prompt`, of messages or texts.
        system_prompt: The system prompt; plain texts get it as their first paragraph.
        as_user: Whether to prepend it to the first message instead, for chat templates without a system role, such as
            Gemma 2's.

    Raises:
        DatasetError: The column `prompt` is missing, or a prompt has a system message already.
    """
    require_columns(dataset, ["prompt"])

    def add(row: dict[str, Any]) -> dict[str, Any]:
        prompt = row["prompt"]
        if isinstance(prompt, str):
            return {"prompt": f"{system_prompt}\n\n{prompt}"}
        content = prompt[0]["content"] if prompt else ""
        if prompt and prompt[0]["role"] == "system":
            raise DatasetError(f"A prompt has a system message already: {content!r}; remove it.")
        # A column of parts holds no texts.
        own: Any = [{"type": "text", "text": system_prompt}] if isinstance(content, list) else system_prompt
        if not as_user:
            return {"prompt": [{"role": "system", "content": own}, *prompt]}
        joined = own + content if isinstance(content, list) else f"{system_prompt}\n\n{content}"
        return {"prompt": [{**prompt[0], "content": joined}, *prompt[1:]]}

    return dataset.map(add, desc="Adding the system prompt")


def pair_columns(
    columns: list[str], prompt: str | None = "prompt", chosen: str = "chosen", rejected: str | None = "rejected"
) -> tuple[str | None, str, str | None]:
    """The names of the columns of pairs in a dataset: the given ones, but known other names for TRL's that it lacks.

    Raises:
        DatasetError: There are several columns of rejected answers, and none is named.
    """
    given = (prompt, chosen, rejected)
    if given == PAIR and {"prompt", "question"}.isdisjoint(columns) and {"chosen", "rejected"} <= set(columns):
        return None, "chosen", "rejected"
    if {name for name, ours in zip(given, PAIR, strict=True) if name == ours} <= set(columns):
        return given
    # If some are named, one that has TRL's name may be too.
    kept = set(columns) if given not in (PAIR, (*PAIR[:2], None)) else set()
    for names in _OTHER_NAMES:
        found = [
            fnmatch.filter(columns, theirs) if name == ours and name not in kept else [name]
            for name, ours, theirs in zip(given, PAIR, names, strict=True)
        ]
        if not all(found):
            continue
        if len(found[2]) > 1:
            raise DatasetError(
                f"The dataset has {len(found[2])} columns of rejected answers: choose one of {found[2]}."
            )
        return tuple(name for (name,) in found)  # pyright: ignore[reportReturnType]
    return given


def _kept(rows: Dataset, keep: list[str] | None) -> list[str]:
    """The columns to keep: those asked for, and those that TRL reads."""
    return list(dict.fromkeys([*(keep or []), *(name for name in _READ_BY_TRL if name in rows.column_names)]))


def _with_template(rows: Dataset, template: str) -> tuple[Dataset, str]:
    """Adds the prompts of a template of several columns; returns the rows and the column of their prompts."""
    if template in rows.column_names or "{" not in template:
        return rows, template
    try:
        pieces = list(Formatter().parse(template))
        if any(spec or conversion for *_, spec, conversion in pieces):
            raise ValueError("formats are not supported")
    except ValueError as error:
        example = "'{context} {question}'"
        raise DatasetError(f"prompt={template!r} is not a template such as {example}: {error}.") from error
    columns = [name for _, name, *_ in pieces if name is not None]
    require_columns(rows, columns)
    prompts: list[str] = []
    for index, row in enumerate(cast(Iterable[dict[str, Any]], rows)):
        texts = {name: _text_in(row, name, index) for name in columns}
        is_empty = bool(columns) and not "".join(texts.values()).strip()
        prompts.append("" if is_empty else "".join(text + texts.get(name or "", "") for text, name, *_ in pieces))
    kept = rows.remove_columns("prompt") if "prompt" in rows.column_names else rows
    return kept.add_column("prompt", cast(Any, prompts)), "prompt"


def _text_in(row: dict[str, Any], column: str, index: int) -> str:
    text = as_text(row[column])
    if text is None:
        raise DatasetError(f"Row {index} has {column}={row[column]!r}: a template needs texts or numbers.")
    return text


def _with_prompts(rows: Dataset, chosen: str, rejected: str) -> Dataset:
    """Splits off the prompt that both answers start with, as TRL does; a missing answer has none."""
    from trl import extract_prompt

    def split(row: dict[str, Any]) -> dict[str, Any]:
        if row["chosen"] and row["rejected"]:
            return extract_prompt(row)
        return {"prompt": None, "chosen": None, "rejected": None}

    renamed = rows.rename_columns({old: new for old, new in ((chosen, "chosen"), (rejected, "rejected")) if old != new})
    return Dataset.from_list([{**row, **split(row)} for row in cast(Iterable[dict[str, Any]], renamed)])


def _without_prompts(cells: dict[str, Any], index: int) -> dict[str, Any]:
    """Removes the prompt from answers that are whole conversations."""
    prompt, found = cells["prompt"], dict(cells)
    for name in ("chosen", "rejected"):
        answer = found.get(name) or []
        if prompt and list(map(_said, answer[: len(prompt)])) == list(map(_said, prompt)):
            found[name] = answer[len(prompt) :]
        elif answer and answer[0]["role"] in ("user", "system"):
            raise DatasetError(
                f"Row {index} has a {name} conversation that does not start with its prompt: keep only the answer, or "
                "pass prompt=None to take the prompt from the conversations."
            )
    return found


def _cell(value: Any, column: str, index: int, chat: bool) -> Any:
    """Converts a cell to a text or to messages."""
    text = as_text(value)
    if text is not None:
        return as_message(column, text.strip()) if chat else text
    if not isinstance(value, list) or not all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in value):
        raise DatasetError(
            f"Row {index} has {column}={value!r}: must be a text, or a list of messages with 'role' and 'content'."
        )
    if not chat:
        raise DatasetError(
            f"Row {index} has messages in {column!r}, but chat=False is for plain texts: pass chat=True."
        )
    return value


def _said(message: dict[str, Any]) -> tuple[str, str, Any]:
    return message["role"], text_of(message).strip(), message.get("tool_calls") or None


def _has_text(cell: Any) -> bool:
    if isinstance(cell, str):
        return bool(cell.strip())
    return any(text or calls for _, text, calls in map(_said, cell))


def _report_left_out(rows: int, pairs: int, reasons: dict[str, list[int]]) -> None:
    found = "; ".join(
        f"{len(indices)} {reason} (first in row {indices[0]})" for reason, indices in reasons.items() if indices
    )
    if not pairs:
        raise DatasetError(f"No preference pair is left of {rows} rows: {found or 'the dataset is empty'}.")
    if found:
        warnings.warn(f"{rows - pairs} of {rows} pairs are left out: {found}.", UserWarning, stacklevel=3)
