"""`yapo data`: preference pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options
from .pairs import PairArguments, reads_pairs

app = typer.Typer(no_args_is_help=True, help="Create preference pairs.")


OutputDir = Annotated[Path, typer.Option(help="Output folder, shared by all processes.")]
ShardSize = Annotated[int, typer.Option(min=1, help="Answers per file; a stopped run resumes from complete files.")]
TopP = Annotated[
    float | None, typer.Option(min=0, max=1, help="Nucleus sampling. Default: the model's generation config.")
]
PushToHub = Annotated[str | None, typer.Option(metavar="NAME", help="Push the pairs to this dataset repository.")]


@app.callback()
def _group() -> None: ...  # pyright: ignore[reportUnusedFunction]


@app.command()
@reads_pairs("rejected", "options", "answer")
def reject(
    model: options.Model,
    data: PairArguments,
    output_dir: OutputDir,
    max_new_tokens: options.MaxNewTokens = 128,
    batch_size: options.BatchSize = 8,
    shard_size: ShardSize = 256,
    seed: options.Seed = 0,
    temperature: options.Temperature = None,
    top_p: TopP = None,
    push_to_hub: PushToHub = None,
    dtype: options.DType = "auto",
) -> None:
    """Create preference pairs with the model's own answers as the rejected ones.

    An interrupted run resumes when it is started again. To use several processes:
    `accelerate launch -m yapo_cli data reject --model ... --dataset ... --output-dir ...`
    """
    from accelerate import PartialState

    from yapo_peft.data import generate_rejected

    from .loading import load_model, load_tokenizer

    sampling, tokenizer = _sampling(temperature, top_p), load_tokenizer(model)
    rows = data.load(tokenizer)
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


@app.command()
def contrast(
    model: options.Model,
    towards: Annotated[
        str, typer.Option(help="What to steer towards, as in 'answers in short plain sentences'; or a system prompt.")
    ],
    away: Annotated[str, typer.Option(help="The opposite, as in 'answers in long flowery sentences'.")],
    output_dir: OutputDir,
    questions: Annotated[
        str | None,
        typer.Option(help="Questions: a text file with one per line, or a dataset with prompts. Default: built in."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of questions. Default: all.")] = None,
    max_new_tokens: options.MaxNewTokens = 128,
    batch_size: options.BatchSize = 8,
    shard_size: ShardSize = 256,
    seed: options.Seed = 0,
    temperature: options.Temperature = None,
    top_p: TopP = None,
    push_to_hub: PushToHub = None,
    dtype: options.DType = "auto",
) -> None:
    """Create preference pairs without a dataset: the model answers questions in two manners that you describe.

    `yapo data contrast --model google/gemma-2-2b-it --towards "answers in short plain sentences"
    --away "answers in long flowery sentences" --output-dir pairs`
    """
    from accelerate import PartialState

    from yapo_peft.data import generate_contrast
    from yapo_peft.data.contrast import packaged_questions

    from .loading import load_model, load_tokenizer

    sampling, tokenizer = _sampling(temperature, top_p), load_tokenizer(model)
    if questions is None:
        asked: Any = packaged_questions()[:limit]
    elif Path(questions).suffix == ".txt":
        asked = [line for line in options.read_text(Path(questions)).splitlines() if line.strip()][:limit]
    else:
        asked = PairArguments(questions, limit=limit).load_prompts(tokenizer)
    pairs = generate_contrast(
        load_model(model, dtype),
        tokenizer,
        towards,
        away,
        output_dir,
        questions=asked,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        shard_size=shard_size,
        seed=seed,
        push_to_hub=push_to_hub,
        **sampling,
    )
    PartialState().print(f"Saved {len(pairs)} pairs to {output_dir}.")


def _sampling(temperature: float | None, top_p: float | None) -> dict[str, Any]:
    """Options of `generate`; those of the model's generation config if nothing is given."""
    if temperature == 0 and top_p is not None:
        raise typer.BadParameter(f"--top-p {top_p}: greedy answers (--temperature 0) are not sampled.")
    given = {name: value for name, value in (("temperature", temperature), ("top_p", top_p)) if value is not None}
    if not given:
        return {}
    return {"do_sample": False} if temperature == 0 else {"do_sample": True, **given}
