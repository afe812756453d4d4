"""`yapo data`: preference pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import BatchSize, Chosen, DType, Limit, Model, Prompt, Split

app = typer.Typer(no_args_is_help=True, help="Create preference pairs.")


@app.callback()
def _group() -> None: ...  # pyright: ignore[reportUnusedFunction]


@app.command()
def reject(
    model: Model,
    dataset: Annotated[str, typer.Option(help="Prompts with chosen answers: a file or a Hub dataset.")],
    output_dir: Annotated[Path, typer.Option(help="Output folder, shared by all processes.")],
    prompt: Prompt = "prompt",
    chosen: Chosen = "chosen",
    split: Split = "train",
    limit: Limit = None,
    plain: Annotated[bool, typer.Option("--plain", help="Do not apply the chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer in tokens.")] = 128,
    batch_size: BatchSize = 8,
    shard_size: Annotated[
        int, typer.Option(min=1, help="Answers per file; a stopped run resumes from complete files.")
    ] = 256,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    temperature: Annotated[float | None, typer.Option(min=0, help="Sampling temperature; 0 is greedy.")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0, max=1, help="Nucleus sampling. Default: the model's generation config.")
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="NAME", help="Push the pairs to this dataset repository.")
    ] = None,
    dtype: DType = "auto",
) -> None:
    """Create preference pairs with the model's own answers as the rejected ones.

    An interrupted run resumes when it is started again. To use several processes:
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
    PartialState().print(f"Saved {len(pairs)} pairs to {output_dir}.")
