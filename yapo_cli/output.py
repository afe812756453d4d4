"""What commands print."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    import pandas as pd


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
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
