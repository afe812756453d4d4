"""`yapo fit`: create adapters without training."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from .options import (
    BatchSize,
    Chosen,
    Dataset,
    DType,
    Layers,
    Limit,
    Model,
    NewFolder,
    Positions,
    Prompt,
    Rejected,
    SaeId,
    SaePath,
    SaeRelease,
    Split,
    read_pairs,
)

app = typer.Typer(
    no_args_is_help=True, help="Create an adapter from activations on preference pairs, without training."
)
Tokens = Annotated[
    Literal["completion", "last"], typer.Option(help="Use the mean over an answer's tokens, or its last token.")
]


@app.command()
def caa(
    model: Model,
    layers: Layers,
    dataset: Dataset,
    out: NewFolder,
    prompt: Prompt = "prompt",
    chosen: Chosen = "chosen",
    rejected: Rejected = "rejected",
    split: Split = "train",
    limit: Limit = None,
    tokens: Tokens = "completion",
    positions: Positions = "all",
    batch_size: BatchSize = 8,
    dtype: DType = "auto",
) -> None:
    """Fit a dense vector with CAA: the mean difference of the answers' activations (arXiv 2312.06681)."""
    from yapo_peft.methods import fit_caa

    source = {"source": dataset, "prompt": prompt, "chosen": chosen, "rejected": rejected, "split": split}
    adapter = {"space": "dense", "layers": layers, "positions": positions}
    _fit(model, dtype, adapter, {**source, "limit": limit}, out, tokens, batch_size, fit_caa, {})


@app.command()
def sas(
    model: Model,
    layers: Layers,
    dataset: Dataset,
    out: NewFolder,
    sae_release: SaeRelease = None,
    sae_id: SaeId = None,
    sae_path: SaePath = None,
    prompt: Prompt = "prompt",
    chosen: Chosen = "chosen",
    rejected: Rejected = "rejected",
    split: Split = "train",
    limit: Limit = None,
    tau: Annotated[float, typer.Option(min=0, max=1, help="Minimum share of answers in which a feature is on.")] = 0.7,
    tokens: Tokens = "completion",
    positions: Positions = "all",
    batch_size: BatchSize = 8,
    dtype: DType = "auto",
) -> None:
    """Fit a sparse code with SAS: the features that differ between the answers (arXiv 2503.00177)."""
    from yapo_peft.methods import fit_sas

    source = {"source": dataset, "prompt": prompt, "chosen": chosen, "rejected": rejected, "split": split}
    saes = {"sae_release": sae_release, "sae_id": sae_id, "sae_path": sae_path}
    adapter = {"space": "sae", "layers": layers, "positions": positions, **saes}
    _fit(model, dtype, adapter, {**source, "limit": limit}, out, tokens, batch_size, fit_sas, {"tau": tau})


def _fit(
    model: str,
    dtype: str,
    adapter: dict[str, Any],
    source: dict[str, Any],
    out: Any,
    tokens: str,
    batch_size: int,
    method: Any,
    options: dict[str, Any],
) -> None:
    from yapo_peft.adapter_file.saving import save_adapter
    from yapo_peft.methods import measure_contrast

    from .loading import attach_adapter, load_tokenizer, require_new

    require_new(out)
    tokenizer = load_tokenizer(model)
    pairs = read_pairs(tokenizer=tokenizer, **source)
    steered = attach_adapter(model, dtype, **adapter)
    contrast = measure_contrast(steered, pairs, tokenizer, tokens=tokens, batch_size=batch_size)
    method(steered, contrast, **options)
    typer.echo(f"Saved to {save_adapter(steered, out)}.")
