"""`yapo explain`: list the features of an adapter."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options
from .pairs import PairArguments, reads_pairs


@reads_pairs(required=False, limit=32)
def explain(
    adapter: options.Adapter,
    data: PairArguments,
    multiplier: Annotated[float, typer.Option(help="Multiplier.")] = 1.0,
    top: Annotated[int, typer.Option(min=1, help="Features to list per layer, by reach.")] = 20,
    tokens: Annotated[int, typer.Option(min=1, help="Promoted and suppressed tokens to list per feature.")] = 8,
    labels: Annotated[bool, typer.Option(help="Fetch labels from Neuronpedia.")] = True,
    batch_size: options.BatchSize = 8,
    base: options.BaseModel = None,
    dtype: options.DType = "auto",
    as_json: options.AsJson = False,
) -> None:
    """List the features that an adapter steers, with the tokens that each promotes and suppresses.

    With --dataset, also how often each acts on these pairs.

    `yapo explain my-adapter --top 10`
    """
    from yapo_peft.interpret import explain as explained

    from .loading import load_adapter, load_tokenizer
    from .output import print_table

    if data.dataset is None:
        data.require_unread("limit")
    tokenizer = load_tokenizer(adapter, base)
    texts = None if data.dataset is None else data.load(tokenizer).to_list()
    table = explained(
        load_adapter(adapter, dtype, base),
        tokenizer=tokenizer,
        multiplier=multiplier,
        top=top,
        tokens=tokens,
        texts=texts,
        labels=labels,
        batch_size=batch_size,
    )
    if not as_json:
        if table.empty:
            return typer.echo("The adapter steers no features.")
        table = table.dropna(axis="columns", how="all")
        table = table.assign(**{name: [" ".join(row) for row in table[name]] for name in ("promotes", "suppresses")})
    print_table(table, as_json)
