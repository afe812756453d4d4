"""`yapo data`: preference pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import BatchSize, Chosen, DType, Limit, Model, Prompt, Split

app = typer.Typer(no_args_is_help=True, help="Make preference pairs.")


@app.callback()
def _group() -> None: ...  # pyright: ignore[reportUnusedFunction]


@app.command()
def reject(
    model: Model,
    dataset: Annotated[
        str, typer.Option(help="Prompts and chosen answers: a file, or the name of a dataset on the Hub.")
    ],
    output_dir: Annotated[Path, typer.Option(help="Where answers and pairs go; the same for all processes.")],
    prompt: Prompt = "prompt",
    chosen: Chosen = "chosen",
    split: Split = "train",
    limit: Limit = None,
    plain: Annotated[bool, typer.Option("--plain", help="Texts without a chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    batch_size: BatchSize = 8,
    shard_size: Annotated[int, typer.Option(min=1, help="Answers to a file, which is what a stop can lose.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="Sample at this one; 0 for the likeliest answers.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0, max=1, help="Sample; without both, as the model's config says.")
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="NAME", help="Dataset repository to push the pairs to.")
    ] = None,
    dtype: DType = "auto",
) -> None:
    """Make pairs of prompts and chosen answers: what the model says by itself becomes the rejected one.

    A run that is started again goes on where it was. Several processes share the work:
    `accelerate launch -m yapo_cli data reject --model ... --dataset ... --output-dir ...`
    """
    from accelerate import PartialState

    from yapo_peft.data import generate_rejected, load_pairs

    from .loading import load_model, load_tokenizer

    rows = load_pairs(dataset, prompt=prompt, chosen=chosen, rejected=None, chat=not plain, split=split)
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    sampling: dict[str, Any] = {
        name: value for name, value in {"temperature": temperature, "top_p": top_p}.items() if value is not None
    }
    if temperature == 0:
        sampling = {"do_sample": False}
    elif sampling:
        sampling["do_sample"] = True
    pairs = generate_rejected(
        load_model(model, dtype),
        load_tokenizer(model),
        rows,
        output_dir,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        shard_size=shard_size,
        seed=seed,
        push_to_hub=push_to_hub,
        **sampling,
    )
    PartialState().print(f"{len(pairs)} pairs are in {output_dir}.")
