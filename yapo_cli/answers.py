"""`yapo answers`: what adapters answer to the prompts of a dataset, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options
from .pairs import PairArguments, reads_pairs


@reads_pairs("chosen", "rejected", "options", "answer")
def answers(
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER...", help="Folders or Hub repositories of adapters of one model.")
    ],
    data: PairArguments,
    out: Annotated[Path, typer.Option(help="Save the answers to this file, answers.jsonl or answers.parquet.")],
    multipliers: options.Multipliers = options.Numbers((-1.0, 0.0, 1.0)),
    max_new_tokens: options.MaxNewTokens = 128,
    temperature: options.Temperature = None,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 8,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="NAME", help="Push the answers to this dataset repository.")
    ] = None,
    base: options.BaseModel = None,
    dtype: options.DType = "auto",
) -> None:
    """Answer the prompts of a dataset with several adapters and multipliers, in a column for each.

    `yapo answers my-adapter another-adapter --dataset test.csv --prompt question --out answers.jsonl`
    """
    if out.suffix not in (".jsonl", ".parquet") or out.is_dir():
        raise typer.BadParameter(f"--out {out}: must be a file that ends in .jsonl or .parquet.")
    from datasets import Dataset

    from yapo_peft import sweep
    from yapo_peft._utils import replacing
    from yapo_peft.evaluation import Repetition

    from .loading import with_each_adapter
    from .lookup import require_one_model

    names = dict(zip(adapters, options.short_names(adapters), strict=True))
    if base is None:
        require_one_model(adapters)
    columns: dict[str, list[Any]] = {}
    generation: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": bool(temperature)}
    generation |= {"temperature": temperature} if temperature else {}

    def add(adapter: str, model: Any, tokenizer: Any, prompts: Any) -> None:
        columns.setdefault("prompt", prompts["prompt"][:])
        # Unsteered, all adapters of a model answer the same.
        asked = [multiplier for multiplier in multipliers if multiplier or "unsteered" not in columns]
        found = sweep(
            model, prompts, tokenizer, asked, measure=Repetition(), batch_size=batch_size, seed=seed, **generation
        ).table
        for multiplier, rows in found.groupby("multiplier", sort=False):  # of which examples are in order
            columns[f"{names[adapter]} at {multiplier:+g}" if multiplier else "unsteered"] = rows["answer"].tolist()
        table = Dataset.from_dict(columns)
        with replacing(out) as partial:  # what is done is not lost if the next adapter fails
            table.to_json(partial) if out.suffix == ".jsonl" else table.to_parquet(partial)

    with_each_adapter(adapters, data.load_prompts, add, dtype, base)
    if push_to_hub is not None:
        Dataset.from_dict(columns).push_to_hub(push_to_hub)
    typer.echo(f"Saved {len(columns['prompt'])} prompts with {len(columns) - 1} answers each to {out}.")
