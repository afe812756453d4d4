"""`yapo fit`: create adapters without training."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from . import options
from .pairs import PairArguments, reads_pairs

app = typer.Typer(
    no_args_is_help=True, help="Create an adapter from activations on preference pairs, without training."
)
Tokens = Annotated[
    Literal["completion", "last"], typer.Option(help="Use the mean over an answer's tokens, or its last token.")
]


@app.command()
@reads_pairs()
def caa(
    model: options.Model,
    layers: options.Layers,
    data: PairArguments,
    out: options.NewFolder,
    tokens: Tokens = "completion",
    positions: options.Positions = "all",
    batch_size: options.BatchSize = 8,
    dtype: options.DType = "auto",
) -> None:
    """Fit a dense vector with CAA: the mean difference of the answers' activations (arXiv 2312.06681)."""
    from yapo_peft.methods import fit_caa

    adapter = {"space": "dense", "layers": options.layer_indices(layers), "positions": positions}
    _fit(fit_caa, model, dtype, adapter, data, out, tokens=tokens, batch_size=batch_size)


@app.command()
@reads_pairs()
def sas(
    model: options.Model,
    layers: options.Layers,
    data: PairArguments,
    out: options.NewFolder,
    sae_release: options.SaeRelease = None,
    sae_id: options.SaeId = None,
    sae_path: options.SaePath = None,
    tau: Annotated[float, typer.Option(min=0, max=1, help="Minimum share of answers in which a feature is on.")] = 0.7,
    tokens: Tokens = "completion",
    positions: options.Positions = "all",
    batch_size: options.BatchSize = 8,
    dtype: options.DType = "auto",
) -> None:
    """Fit a sparse code with SAS: the features that differ between the answers (arXiv 2503.00177)."""
    from yapo_peft.methods import fit_sas

    saes = {"sae_release": sae_release, "sae_id": sae_id, "sae_path": sae_path}
    adapter = {"space": "sae", "layers": options.layer_indices(layers), "positions": positions, **saes}
    fit = partial(fit_sas, tau=tau)
    _fit(fit, model, dtype, adapter, data, out, tokens=tokens, batch_size=batch_size)


def _fit(
    fit: Any,
    model: str,
    dtype: str,
    adapter: dict[str, Any],
    data: PairArguments,
    out: Path,
    **measuring: Any,
) -> None:
    from yapo_peft.adapter_file.saving import save_adapter
    from yapo_peft.methods import measure_contrast

    from .loading import attach_adapter, load_tokenizer

    tokenizer = load_tokenizer(model)
    rows = data.load(tokenizer)
    steered = attach_adapter(model, dtype, **adapter)
    fit(steered, measure_contrast(steered, rows, tokenizer, **measuring))
    typer.echo(f"Saved to {save_adapter(steered, out)}.")
