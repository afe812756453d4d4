"""Reads the texts that SAEs are trained and measured on. Commands import this when they run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import typer
from datasets import load_dataset
from datasets.exceptions import DatasetsError

from yapo_peft import DatasetError
from yapo_peft.data import load_rows
from yapo_peft.data.sources import BUILDERS, as_message, is_file

from . import options


def texts_of(source: str, split: str, is_chat: bool) -> Iterator[Any]:
    """The texts of SOURCE[:COLUMNS]; both of a pair's answers are texts.

    Args:
        source: A file, a saved dataset or a Hub dataset, with the columns to read after colons.
        split: Split of Hub or saved datasets.
        is_chat: Whether prompts and answers of columns are messages.
    """
    name, columns = _named(source)
    formats = (".txt", ".md", *BUILDERS)
    if Path(name).is_file() and Path(name).suffix.lower() not in formats:
        raise typer.BadParameter(f"--dataset {source}: must be one of {', '.join(formats)}.")
    if Path(name).suffix.lower() in (".txt", ".md"):
        if columns:
            raise typer.BadParameter(f"--dataset {source}: a text file has no columns.")
        if not Path(name).is_file():
            raise FileNotFoundError(f"The file {name!r} does not exist.")
        return options.read_pieces(Path(name))
    if len(columns) > 2:
        raise typer.BadParameter(f"--dataset {source}: name one column, or those of prompts and of answers.")
    rows = _rows(name, split)
    wanted = [*columns[:1], *(columns[1].split(",") if len(columns) == 2 else [])]
    there = list(next(iter(rows), {}))
    known = {"text", "messages", "prompt"}
    missing = next((column for column in wanted if column not in there), None)
    if there and (missing is not None or not (columns or known & set(there))):
        raise typer.BadParameter(
            f"--dataset {source}: there is no column {missing or 'text'!r} among {', '.join(map(repr, there))}. Name "
            f"the column of texts, such as {name}:{there[0]}, or those of prompts and of answers, such as "
            f"{name}:{there[0]}:{there[-1]}."
        )
    if not columns:
        return chain.from_iterable(map(_both_answers, rows))
    return chain.from_iterable(_picked(row, wanted, is_chat) for row in rows)


def _named(source: str) -> tuple[str, list[str]]:
    """Splits SOURCE:COLUMN or SOURCE:PROMPT:ANSWERS, of which a source may be a path with a drive."""
    if Path(source).exists():
        return source, []
    drive, rest = (source[:2], source[2:]) if source[1:3] in (":\\", ":/") else ("", source)
    name, *columns = rest.split(":")
    return drive + name, columns


def _rows(name: str, split: str) -> Iterable[Any]:
    if is_file(Path(name)) or Path(name).exists():
        return load_rows(name, split if Path(name).is_dir() else "train")
    config = None
    if name.count("/") == 2:
        name, _, config = name.rpartition("/")
    try:
        return load_dataset(name, config, split=split, streaming=True)
    except (ValueError, DatasetsError) as error:
        raise DatasetError(f"--dataset {name} cannot be read from the Hub: {error}") from error


def _both_answers(row: Any) -> Iterator[Any]:
    yield row
    is_pair = not (row.get("text") or row.get("messages")) and row.get("prompt") and row.get("chosen")
    if is_pair and row.get("rejected"):
        yield {**row, "chosen": row["rejected"]}


def _picked(row: Any, columns: list[str], is_chat: bool) -> Iterator[Any]:
    prompt, *answers = (row[column] for column in columns)
    if not answers:
        yield prompt
    for answer in filter(None, answers):
        before = prompt
        if isinstance(prompt, str) and isinstance(answer, str):
            before = as_message("prompt", prompt) if is_chat else f"{prompt}\n"
        yield {"prompt": before, "completion": answer}
