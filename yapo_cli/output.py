"""What commands print."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any, TextIO

import typer

if TYPE_CHECKING:
    import pandas as pd


@contextmanager
def only_json(wanted: bool) -> Generator[None]:
    """Within it, if wanted, standard output has JSON alone: what libraries print goes to standard error."""
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


def print_table(table: pd.DataFrame, as_json: bool, said: str | None = None) -> None:
    """Prints a table, as JSON rows if asked; with neither numbers nor texts where it has none."""
    if as_json:
        print_json(json.loads(str(table.to_json(orient="records"))))
    else:
        typer.echo(table.to_string(index=False, na_rep="", float_format=lambda value: f"{value:.4g}"))
        if said is not None:
            typer.echo(said)


def print_json(value: Any) -> None:
    """Prints a value as JSON."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False), file=_stdout or sys.stdout)
