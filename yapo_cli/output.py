"""Output of commands."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Generator
from contextlib import contextmanager, redirect_stdout
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer

if TYPE_CHECKING:
    import pandas as pd


@contextmanager
def only_json(wanted: bool) -> Generator[None]:
    """If wanted, redirects what libraries print to standard error, so that standard output has JSON only."""
    global _stdout
    if not wanted:
        yield
        return
    _stdout = sys.stdout
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _stdout = None


_stdout: TextIO | None = None


@contextmanager
def quiet_libraries() -> Generator[None]:
    """Leaves out what libraries tell developers: coming changes of their interfaces, and kernels that are not there."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # It lists its defaults.
    logging.getLogger("accelerate.commands.launch").setLevel(logging.ERROR)
    # They log what they raise.
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", category)
        yield


def print_table(table: pd.DataFrame, as_json: bool) -> None:
    """Prints a table, with the bounds of intervals behind their values, or its rows as JSON."""
    if as_json:
        return print_json(records(table))
    shown = table.copy()
    for name in [name for name in table if {f"{name}_low", f"{name}_high"} <= {*table}]:
        cells = zip(table[name], shown.pop(f"{name}_low"), shown.pop(f"{name}_high"), strict=True)
        shown[name] = [f"{value:.4g} [{low:.3g}, {high:.3g}]" if value == value else "" for value, low, high in cells]
    typer.echo(shown.to_string(index=False, na_rep="", float_format=lambda value: f"{value:.4g}"))


def plot_title(what: str, dataset: str | None, *models: str) -> str:
    """A title that says what was measured, on which dataset and models, and when."""
    names = sorted({Path(model).name for model in models})
    return f"{what} on {Path(str(dataset)).name}\n{', '.join([*names, date.today().isoformat()])}"


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table in types that JSON has; what is missing is None."""
    return json.loads(str(table.to_json(orient="records")))


def print_json(value: Any) -> None:
    """Prints a value as JSON."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False), file=_stdout or sys.stdout)
