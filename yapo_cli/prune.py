"""`yapo prune`: keep an adapter's strongest features."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from . import options


def prune(
    adapter: options.Adapter,
    features: Annotated[int, typer.Option(min=1, help="Number of features to keep, over all layers.")],
    out: options.NewFolder,
    rescale: Annotated[
        bool,
        typer.Option("--rescale", help="Rescale the kept entries, so that the effect at multiplier 1 stays similar."),
    ] = False,
    base: options.BaseModel = None,
    dtype: options.DType = "auto",
) -> None:
    """Keep the features of a sparse adapter that change activations the most.

    `yapo prune my-adapter --features 64 --rescale --out my-adapter-64`
    """
    from yapo_peft.adapter_file.saving import save_adapter
    from yapo_peft.methods import prune as pruned

    from .loading import load_adapter, require_effect

    model = load_adapter(adapter, dtype, base)
    before = _entries(model)
    pruned(model, features, rescale=rescale)
    require_effect(model)
    typer.echo(f"{_entries(model)} of {before} features kept.")
    typer.echo(f"Saved to {save_adapter(model, out)}.")


def _entries(model: Any) -> int:
    from yapo_peft.tuner.adapters import adapter_of

    return sum(int(layer.code("default").count_nonzero()) for layer in adapter_of(model, "default")[2])
