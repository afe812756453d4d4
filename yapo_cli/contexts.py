"""`yapo contexts`: the passages where features are most active."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options
from .pairs import PairArguments, reads_pairs


@reads_pairs(required=False)
def contexts(
    adapter: options.Adapter,
    data: PairArguments,
    text: Annotated[Path | None, typer.Option(help="Text file to search, instead of pairs.")] = None,
    feature: Annotated[
        list[str] | None,
        typer.Option(metavar="LAYER:FEATURE", help="A feature, such as 14:1965; repeat for more. Default: --top."),
    ] = None,
    top: Annotated[
        int | None, typer.Option(min=1, help="Number of the adapter's features to search for, by reach. Default: 5.")
    ] = None,
    passages: Annotated[int, typer.Option(min=1, help="Passages per feature.")] = 5,
    window: Annotated[int, typer.Option(min=0, help="Tokens to show before and after the peak.")] = 12,
    batch_size: options.BatchSize = 8,
    base: options.BaseModel = None,
    dtype: options.DType = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Show the passages of a text, or of pairs, where features of an adapter's SAEs are most active.

    `yapo contexts my-adapter --text wiki.txt --feature 14:1965`
    """
    from yapo_peft import ConfigError
    from yapo_peft.interpret import contexts as found_in
    from yapo_peft.interpret import explain

    from .loading import load_adapter, load_tokenizer
    from .output import print_table

    if (text is None) == (data.dataset is None):
        both = text is not None
        raise typer.BadParameter(f"pass {'only one of --text and --dataset' if both else '--text, or else --dataset'}.")
    if text is not None:
        data.require_unread()
    if feature is not None and top is not None:
        raise typer.BadParameter("--top and --feature: pass one of them.")
    wanted = None if feature is None else _read(feature)
    tokenizer = load_tokenizer(adapter, base)
    texts: Any = data.load(tokenizer).to_list() if text is None else options.paragraphs(text)
    model = load_adapter(adapter, dtype, base)
    if wanted is None:
        wanted = {}
        for row in explain(model, tokenizer=tokenizer, top=top or 5, labels=False).to_dict("records"):
            if isinstance(row["feature"], int):
                wanted.setdefault(row["layer"], []).append(row["feature"])
        if not wanted:
            raise ConfigError(f"The adapter {adapter} steers no features of an SAE: name some with --feature.")
    table = found_in(model, wanted, texts, tokenizer, top=passages, window=window, batch_size=batch_size)
    if as_json:
        return print_table(table, as_json)
    if table.empty:
        return typer.echo("None of these features is active in the text.")
    for _, rows in table.groupby(["layer", "feature"], sort=False):
        typer.secho(f"Layer {rows['layer'].iloc[0]}, feature {rows['feature'].iloc[0]}", bold=True)
        for row in rows.to_dict("records"):
            typer.echo(f"  {row['peak']:8.3g}  {_passage(row, window)}")


def _passage(row: dict[str, Any], window: int) -> str:
    """The passage of a row, on one line, with its peak in brackets."""
    place = min(row["position"], window)
    tokens = [f"[[{token}]]" if index == place else token for index, token in enumerate(row["tokens"])]
    return " ".join("".join(tokens).split())


def _read(texts: list[str]) -> dict[int, list[int]]:
    """Reads "14:1965"."""
    found: dict[int, list[int]] = {}
    for text in texts:
        layer, _, index = text.partition(":")
        if not layer.isdecimal() or not index.isdecimal():
            raise typer.BadParameter(f"--feature {text}: must be LAYER:FEATURE, such as 14:1965.")
        found.setdefault(int(layer), []).append(int(index))
    return found
