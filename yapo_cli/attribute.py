"""`yapo attribute`: what each feature of an adapter contributes to its effect."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options
from .pairs import PairArguments, reads_pairs

# Share of the effect.
_LARGE_ERROR = 0.1


@reads_pairs(required=False, limit=32)
def attribute(
    adapter: options.Adapter,
    data: PairArguments,
    pair: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT CHOSEN REJECTED", help="A prompt and two answers, instead of --dataset."),
    ] = None,
    multiplier: Annotated[float, typer.Option(help="Multiplier.")] = 1.0,
    top: Annotated[int, typer.Option(min=1, help="Number of features to ablate one by one, and to list.")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="Multipliers to average integrated gradients over.")] = 16,
    batch_size: options.BatchSize = 8,
    base: options.BaseModel = None,
    dtype: options.DType = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Show what each feature contributes to the effect on the margin, by ablation and integrated gradients, in nats.

    `yapo attribute my-adapter --dataset test.csv --top 10`
    """
    from datasets import Dataset

    from yapo_peft.interpret import attribute as attributed
    from yapo_peft.interpret.checks import require_multiplier

    from .loading import load_adapter, load_tokenizer
    from .output import print_json, print_table, records

    if bool(pair) == (data.dataset is not None):
        raise typer.BadParameter("pass --dataset, or else a prompt and two answers.")
    rows = None
    if pair:
        data.require_unread("system", "plain", "limit")
        if len(pair) != 3:
            raise typer.BadParameter(f"{' '.join(map(repr, pair))}: pass a prompt, its chosen and its rejected answer.")
        rows = Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), pair, strict=True))])
    require_multiplier(multiplier)
    tokenizer = load_tokenizer(adapter, base)
    pairs = data.load(tokenizer, rows)
    found = attributed(
        load_adapter(adapter, dtype, base),
        pairs,
        tokenizer,
        multiplier=multiplier,
        top=top,
        steps=steps,
        batch_size=batch_size,
    )
    table = found.features.head(top)
    figures = ("effect", "rest", "interaction", "integration_error", "pairs")
    values = {name: getattr(found, name) for name in figures}
    if as_json:
        return print_json({**values, "features": records(table)})
    print_table(table.dropna(axis="columns", how="all"), as_json)
    typer.echo("\n" + ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items()))
    share = abs(found.integration_error) / max(abs(found.effect), 1e-12)
    if share > _LARGE_ERROR:
        typer.echo(f"The integration error is {share:.0%} of the effect: raise --steps to rely on `integrated`.")
