"""`yapo export`: convert an adapter for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from . import options


def export(
    adapter: options.Adapter,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output file; a folder for vec.")],
    format: Annotated[
        Literal["gguf", "lm-eval", "neuronpedia", "safetensors", "vec"],
        typer.Option(
            help="llama.cpp control vector, lm-eval steered model, Neuronpedia upload, tensors, or BiPO's .pt files."
        ),
    ],
    multiplier: Annotated[float, typer.Option(help="Multiplier to bake into the file.")] = 1.0,
    text: Annotated[
        Path | None, typer.Option(help="Text file to fit a constant vector on, if no exact one exists.")
    ] = None,
    max_kl: Annotated[
        float, typer.Option(min=0, help="Fail if the KL from exact steering exceeds this, in nats per token.")
    ] = 0.01,
    model_id: Annotated[str | None, typer.Option(help="Neuronpedia's name for the model.")] = None,
    label: Annotated[str | None, typer.Option(help="Name of the vector on Neuronpedia.")] = None,
    batch_size: options.BatchSize = 8,
    base: options.BaseModel = None,
    dtype: options.DType = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Export an adapter at one multiplier to another program's format, and report how exact it is.

    `yapo export polite-gemma polite.gguf --format gguf --multiplier 1.5 --text sample.txt`
    """
    from yapo_peft.export import export_adapter

    from .loading import load_adapter, load_tokenizer
    from .output import print_json

    tokenizer = load_tokenizer(adapter, base)
    found = export_adapter(
        load_adapter(adapter, dtype, base),
        out,
        format,
        multiplier,
        None if text is None else options.paragraphs(text),
        tokenizer,
        max_kl=max_kl,
        model_id=model_id,
        label=label or Path(adapter).name,
        batch_size=batch_size,
    )
    verdict = f"Exact at multiplier {multiplier:g}, with the same SAE." if found is None else found.verdict()
    if as_json:
        measured = (
            {} if found is None else {name: getattr(found, name) for name in ("kl", "clipped", "lowered", "tokens")}
        )
        return print_json({"path": str(out), "exact": found is None or found.is_exact, "verdict": verdict, **measured})
    typer.echo(f"{verdict}\nSaved to {out}.")
