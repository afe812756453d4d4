"""`yapo combine`: combine adapters into one."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from . import options

_COMBINED = "combined"


def combine(
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER...", help="Adapters of the same model and SAEs.")],
    weights: Annotated[
        options.Numbers,
        typer.Option(
            parser=options.numbers, metavar="NUMBERS", help="Weight of each adapter; a negative one subtracts it."
        ),
    ],
    out: options.NewFolder,
    kind: Annotated[
        Literal["linear", "ties", "magnitude_prune"],
        typer.Option("--type", help="Weighted sum of the codes, TIES, or weighted sum of their largest entries."),
    ] = "linear",
    density: Annotated[
        float | None, typer.Option(help="Share of the entries that ties and magnitude_prune keep.")
    ] = None,
    majority_sign: Annotated[
        Literal["total", "frequency"], typer.Option(help="How TIES elects the sign of a feature.")
    ] = "total",
    sae_path: options.SaePath = None,
    base: options.BaseModel = None,
    dtype: options.DType = "auto",
) -> None:
    """Combine adapters into one with PEFT's `add_weighted_adapter`.

    `yapo combine polite brief --weights 1,-0.5 --out polite-not-brief`
    """
    if len(weights) != len(adapters):
        raise typer.BadParameter(f"--weights has {len(weights)} numbers for {len(adapters)} adapters.")
    if majority_sign != "total" and kind != "ties":
        raise typer.BadParameter(f"--majority-sign needs --type ties, not {kind}.")
    from yapo_peft import register_sae
    from yapo_peft.adapter_file.saving import save_adapter
    from yapo_peft.sae.loader import read_sae

    from .loading import load_together, require_effect

    # Self-contained adapters do not need their SAEs, and may not say where they are.
    for path in sae_path or []:
        register_sae(read_sae(path=path))
    model, names = load_together(adapters, dtype, base)
    model.base_model.add_weighted_adapter(
        names, list(weights), _COMBINED, combination_type=kind, density=density, majority_sign_method=majority_sign
    )
    require_effect(model, _COMBINED)
    typer.echo(f"Saved to {save_adapter(model, out, _COMBINED)}.")
