"""`yapo explain`: list the features of an adapter."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options


def explain(
    adapter: options.Adapter,
    multiplier: Annotated[float, typer.Option(help="Multiplier.")] = 1.0,
    top: Annotated[int, typer.Option(min=1, help="Features to list per layer, by reach.")] = 20,
    tokens: Annotated[int, typer.Option(min=1, help="Promoted and suppressed tokens to list per feature.")] = 8,
    labels: Annotated[bool, typer.Option(help="Fetch labels from Neuronpedia.")] = True,
    dataset: Annotated[
        str | None, typer.Option(help="Preference pairs to measure how often each feature acts.")
    ] = None,
    prompt: options.Prompt = "prompt",
    chosen: options.Chosen = "chosen",
    rejected: options.Rejected = "rejected",
    split: options.Split = "train",
    limit: options.Limit = 32,
    batch_size: options.BatchSize = 8,
    base: options.BaseModel = None,
    dtype: options.DType = "auto",
    as_json: options.AsJson = False,
) -> None:
    """List the features that an adapter steers, with the tokens that each promotes and suppresses.

    `yapo explain my-adapter --top 10`
    """
    from yapo_peft.interpret import explain as explained

    from .loading import load_adapter, load_tokenizer, read_pairs
    from .output import print_table

    tokenizer = load_tokenizer(adapter, base)
    texts = None
    if dataset is not None:
        texts = read_pairs(dataset, tokenizer, prompt, chosen, rejected, split, limit).to_list()
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
