"""`yapo export`: an adapter for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import Adapter, AsJson, BatchSize, DType, paragraphs


def export(
    adapter: Adapter,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File to write; for vec, a folder.")],
    format: Annotated[
        Literal["gguf", "lm-eval", "neuronpedia", "safetensors", "vec"],
        typer.Option(help="llama.cpp's control vector; lm-eval's steered; bodies for Neuronpedia; plain; vec_ep*.pt."),
    ],
    multiplier: Annotated[float, typer.Option(help="Multiplier, which becomes part of the file.")] = 1.0,
    text: Annotated[Path | None, typer.Option(help="File of text to fit a constant on, where none is exact.")] = None,
    max_kl: Annotated[
        float, typer.Option(min=0, help="Refuse what is further from the true steering, in nats.")
    ] = 0.01,
    model_id: Annotated[str | None, typer.Option(help="Neuronpedia's name of the model.")] = None,
    label: Annotated[str | None, typer.Option(help="What Neuronpedia calls the vector.")] = None,
    batch_size: BatchSize = 8,
    dtype: DType = "auto",
    as_json: AsJson = False,
) -> None:
    """Write an adapter at one multiplier as a file of another program, and say how exact it is there.

    `yapo export polite-gemma polite.gguf --format gguf --multiplier 1.5 --text sample.txt`
    """
    from yapo_peft.export import export_adapter

    from .loading import load_adapter, load_tokenizer
    from .output import print_json

    tokenizer = load_tokenizer(adapter)
    found = export_adapter(
        load_adapter(adapter, dtype),
        out,
        format,
        multiplier,
        None if text is None else paragraphs(text),
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
    typer.echo(f"{verdict}\nIt is in {out}.")
