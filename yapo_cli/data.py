"""`yapo data`: preference pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options
from .pairs import PairArguments, reads_pairs

app = typer.Typer(no_args_is_help=True, help="Create preference pairs.")


@app.callback()
def _group() -> None: ...  # pyright: ignore[reportUnusedFunction]


@app.command()
@reads_pairs("rejected", "options", "answer")
def reject(
    model: options.Model,
    data: PairArguments,
    output_dir: Annotated[Path, typer.Option(help="Output folder, shared by all processes.")],
    max_new_tokens: options.MaxNewTokens = 128,
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

    from yapo_peft.data import generate_rejected

    from .loading import load_model, load_tokenizer

    if temperature == 0 and top_p is not None:
        raise typer.BadParameter(f"--top-p {top_p}: greedy answers (--temperature 0) are not sampled.")
    tokenizer = load_tokenizer(model)
    rows = data.load(tokenizer)
    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    if sampling:
        sampling = {"do_sample": True, **sampling} if temperature != 0 else {"do_sample": False}
    pairs = generate_rejected(
        load_model(model, dtype),
        tokenizer,
        rows,
        output_dir,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        shard_size=shard_size,
        seed=seed,
        push_to_hub=push_to_hub,
        **sampling,
    )
    PartialState().print(f"Saved {len(pairs)} pairs to {output_dir}.")
