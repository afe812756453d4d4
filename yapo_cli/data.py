"""`yapo data`: preference pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options

app = typer.Typer(no_args_is_help=True, help="Create preference pairs.")


@app.callback()
def _group() -> None: ...  # pyright: ignore[reportUnusedFunction]


@app.command()
def reject(
    model: options.Model,
    dataset: Annotated[str, typer.Option(help="Prompts with chosen answers: a file or a Hub dataset.")],
    output_dir: Annotated[Path, typer.Option(help="Output folder, shared by all processes.")],
    prompt: options.Prompt = "prompt",
    chosen: options.Chosen = "chosen",
    split: options.Split = "train",
    limit: options.Limit = None,
    plain: Annotated[bool, typer.Option("--plain", help="Do not apply the chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer in tokens.")] = 128,
    batch_size: options.BatchSize = 8,
    shard_size: Annotated[
        int, typer.Option(min=1, help="Answers per file; a stopped run resumes from complete files.")
    ] = 256,
    seed: options.Seed = 0,
    temperature: options.Temperature = None,
    top_p: Annotated[
        float | None, typer.Option(min=0, max=1, help="Nucleus sampling. Default: the model's generation config.")
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="NAME", help="Push the pairs to this dataset repository.")
    ] = None,
    dtype: options.DType = "auto",
) -> None:
    """Create preference pairs with the model's own answers as the rejected ones.

    An interrupted run resumes when it is started again. To use several processes:
    `accelerate launch -m yapo_cli data reject --model ... --dataset ... --output-dir ...`
    """
    from accelerate import PartialState

    from yapo_peft.data import generate_rejected, load_pairs

    from .loading import first_rows, load_model, load_tokenizer

    rows = load_pairs(dataset, prompt=prompt, chosen=chosen, rejected=None, chat=not plain, split=split)
    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    if sampling:
        sampling = {"do_sample": True, **sampling} if temperature != 0 else {"do_sample": False}
    pairs = generate_rejected(
        load_model(model, dtype),
        load_tokenizer(model),
        first_rows(rows, limit),
        output_dir,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        shard_size=shard_size,
        seed=seed,
        push_to_hub=push_to_hub,
        **sampling,
    )
    PartialState().print(f"Saved {len(pairs)} pairs to {output_dir}.")
