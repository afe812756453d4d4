"""Options shared by several commands."""

from __future__ import annotations

import math
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer


class Numbers(tuple[float, ...]):
    """Comma-separated numbers."""


def numbers(text: str | Numbers) -> Numbers:
    """Reads "-1,0,1.5"."""
    if isinstance(text, Numbers):
        return text
    try:
        found = Numbers(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r}: must be comma-separated numbers, such as -1,0,1.5.") from None
    if not all(map(math.isfinite, found)):
        raise typer.BadParameter(f"{text!r}: must be finite numbers.")
    return found


def _temperature(value: float | None) -> float | None:
    if value and not 1e-3 <= value <= 1e3:
        raise typer.BadParameter(f"{value:g}: must be 0 for greedy answers, or between 0.001 and 1000.")
    return value


def layer_indices(text: str) -> list[int]:
    """Reads "14,15"."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--layers {text!r}: must be comma-separated whole numbers.") from None


def _new_folder(folder: Path) -> Path:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise typer.BadParameter(f"{folder} is not empty: pass another folder.")
    return folder


Adapter = Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder or Hub repository of an adapter.")]
Model = Annotated[str, typer.Option(help="Folder or Hub repository of the model.")]
BaseModel = Annotated[
    str | None, typer.Option("--model", help="Where the adapter's model is, if it is not where the adapter says.")
]
Multipliers = Annotated[
    Numbers, typer.Option(parser=numbers, metavar="NUMBERS", help="Comma-separated multipliers; 0 is unsteered.")
]
DType = Annotated[str, typer.Option("--dtype", help="dtype to load the model in, such as bfloat16; auto is as saved.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of sampling.")]
Temperature = Annotated[
    float | None, typer.Option(min=0, callback=_temperature, help="Sampling temperature; 0 is greedy.")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Maximum length of an answer in tokens.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows per forward pass.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
NeutralText = Annotated[
    Path | None, typer.Option(exists=True, dir_okay=False, help="Text file to measure on; default: built in.")
]
NewFolder = Annotated[
    Path, typer.Option("--out", callback=_new_folder, help="Output folder; must be empty or not exist.")
]

Layers = Annotated[str, typer.Option(metavar="NUMBERS", help="Layers to steer, such as 14 or 14,15; -1 is the last.")]
SaeRelease = Annotated[str | None, typer.Option(help="SAE release in SAELens; see `yapo sae list`.")]
SaeId = Annotated[list[str] | None, typer.Option(help="SAE in the release; repeat for each layer.")]
SaePath = Annotated[list[str] | None, typer.Option(help="Folder of a local SAE; repeat for each layer.")]
Positions = Annotated[
    str, typer.Option(help="Tokens to steer: all, completion, last, prompt, or a slice such as prompt[-4:].")
]


def require_trainable(dtype: str) -> None:
    """Raises `typer.BadParameter` unless a dtype is one that TRL loads models in."""
    known = ("auto", "bfloat16", "float16", "float32")
    if dtype not in known:
        raise typer.BadParameter(f"--dtype {dtype}: must be one of {', '.join(known)} to train.")


def short_names(adapters: list[str]) -> list[str]:
    """Names of adapters that tell them apart. Raises `typer.BadParameter` if one is given twice."""
    places = {Path(adapter).resolve() if Path(adapter).exists() else adapter for adapter in adapters}
    if len(places) < len(adapters):
        raise typer.BadParameter(f"{' '.join(adapters)}: an adapter is given twice.")
    names = ["/".join(Path(adapter).parts[-2 if _is_checkpoint(Path(adapter)) else -1 :]) for adapter in adapters]
    return names if len(set(names)) == len(names) else adapters


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder has the name that trainers give to checkpoints."""
    start, _, step = folder.name.partition("-")
    return start == "checkpoint" and step.isdecimal()


def with_checkpoints(adapters: list[str]) -> list[str]:
    """Replaces folders of checkpoints by the checkpoints that have an adapter, by their steps.

    Raises `typer.BadParameter` if a folder has neither an adapter, nor a model, nor such checkpoints.
    """
    found: list[str] = []
    for adapter in adapters:
        folder = Path(adapter).expanduser()
        if not folder.is_dir() or any((folder / file).is_file() for file in ("adapter_config.json", "config.json")):
            found.append(adapter)
            continue
        inner = [file.parent for file in folder.glob("*/adapter_config.json") if _is_checkpoint(file.parent)]
        if not inner:
            raise typer.BadParameter(
                f"The folder {adapter} has neither an adapter nor checkpoints of one: pass a folder with "
                "adapter_config.json, or with checkpoint-* folders that have it."
            )
        found += [str(each) for each in sorted(inner, key=lambda each: int(each.name.partition("-")[2]))]
    return found


def read_text(file: Path) -> str:
    """Reads a text file."""
    with _utf8(file):
        return file.read_text(encoding="utf-8")


def read_pieces(file: Path) -> Iterator[str]:
    """Reads a long text file in pieces of some thousand characters, which end at line breaks."""
    with _utf8(file), file.open(encoding="utf-8") as lines:
        while piece := lines.readlines(4000):
            yield "".join(piece)


@contextmanager
def _utf8(file: Path) -> Generator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{file} is not UTF-8 text (byte {error.start}): convert it.") from None


def paragraphs(file: Path) -> list[str]:
    """The paragraphs of a text file, separated by empty lines."""
    text = read_text(file)
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()] or [text]
