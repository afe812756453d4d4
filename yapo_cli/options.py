"""Options that several commands have, and how they are read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer


class Numbers(tuple[float, ...]):
    """Numbers, written with commas between them."""


def numbers(text: str | Numbers) -> Numbers:
    """Reads "-1,0,1.5"."""
    if isinstance(text, Numbers):
        return text
    try:
        found = Numbers(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r}: write numbers with commas between them, such as -1,0,1.5.") from None
    if not all(map(math.isfinite, found)):
        raise typer.BadParameter(f"{text!r}: each number has to be finite.")
    return found


def whole_numbers(text: str, option: str) -> list[int]:
    """Reads "14,15"."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{option} {text!r}: write whole numbers with commas between them.") from None


Adapter = Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder or Hub name of an adapter.")]
Model = Annotated[str, typer.Option(help="Folder or Hub name of the model.")]
Multipliers = Annotated[
    Numbers, typer.Option(parser=numbers, metavar="NUMBERS", help="Multipliers, such as -1,0,1; 0 is unsteered.")
]
DType = Annotated[str, typer.Option("--dtype", help="Type of the model's weights, such as bfloat16.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows per forward pass.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for a script to read.")]
NewFolder = Annotated[Path, typer.Option("--out", help="Folder of the new adapter; refused if it has something in it.")]

Dataset = Annotated[
    str, typer.Option(help="Preference pairs: a CSV, JSON or Parquet file, a saved folder, a Hub name.")
]
Prompt = Annotated[str, typer.Option(help="Column of the prompts.")]
Chosen = Annotated[str, typer.Option(help="Column of the answers to prefer.")]
Rejected = Annotated[str, typer.Option(help="Column of the other answers.")]
Split = Annotated[str, typer.Option(help="Split of a Hub dataset or a saved folder.")]
Limit = Annotated[
    int | None,
    typer.Option(min=1, help="How many rows to read, from the start (blocks of 256 tokens, of text); all if missing."),
]

Layers = Annotated[str, typer.Option(metavar="NUMBERS", help="Blocks to steer, such as 14 or 14,15; -1 is the last.")]
SaeRelease = Annotated[str | None, typer.Option(help="Release in sae-lens' directory; see `yapo sae list`.")]
SaeId = Annotated[list[str] | None, typer.Option(help="SAE within the release; once for each block.")]
SaePath = Annotated[list[str] | None, typer.Option(help="Folder of a local SAE, instead; once for each block.")]
Positions = Annotated[str, typer.Option(help="Tokens to steer: all, completion or last.")]


def read_pairs(
    source: str, tokenizer: Any, prompt: str, chosen: str, rejected: str, split: str, limit: int | None
) -> Any:
    """Pairs as messages for a model with a chat template, else as texts."""
    from yapo_peft.data import load_pairs

    chat = bool(getattr(tokenizer, "chat_template", None))
    pairs = load_pairs(source, prompt=prompt, chosen=chosen, rejected=rejected, chat=chat, split=split)
    return pairs if limit is None else pairs.select(range(min(limit, len(pairs))))


def read_text(file: Path) -> str:
    """What a file of text says."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{file} is no text in UTF-8 (byte {error.start}): convert it.") from None


def paragraphs(file: Path) -> list[str]:
    """The parts of a file of text between its empty lines."""
    text = read_text(file)
    return [part.strip() for part in text.split("\n\n") if part.strip()] or [text]
