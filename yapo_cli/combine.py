"""`yapo combine`: one adapter of several."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from .options import DType, NewFolder, Numbers, numbers

_COMBINED = "combined"


def combine(
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER...", help="Adapters of one model, on the same SAEs.")
    ],
    weights: Annotated[
        Numbers, typer.Option(parser=numbers, metavar="NUMBERS", help="A factor for each; negative ones subtract.")
    ],
    out: NewFolder,
    kind: Annotated[
        Literal["linear", "ties", "magnitude_prune"],
        typer.Option("--type", help="Sum of the codes, TIES, or the sum of their largest entries."),
    ] = "linear",
    density: Annotated[float | None, typer.Option(help="Share of each code's entries that pruning keeps.")] = None,
    majority_sign: Annotated[
        Literal["total", "frequency"], typer.Option(help="How TIES elects the sign of a feature.")
    ] = "total",
    dtype: DType = "auto",
) -> None:
    """Combine adapters into one code, as PEFT's `add_weighted_adapter`.

    `yapo combine polite brief --weights 1,-0.5 --out polite-not-brief`
    """
    if len(weights) != len(adapters):
        raise typer.BadParameter(f"--weights has {len(weights)} numbers for {len(adapters)} adapters.")
    if majority_sign != "total" and kind != "ties":
        raise typer.BadParameter(f"--majority-sign is for --type ties; --type {kind} elects no sign.")
    from yapo_peft.adapter_file.saving import save_adapter

    from .loading import load_adapter, require_effect, require_new

    require_new(out)
    first, *others = adapters
    model = load_adapter(first, dtype)
    names = ["default", *(f"adapter {place}" for place in range(2, len(adapters) + 1))]
    for name, source in zip(names[1:], others, strict=True):
        model.load_adapter(source, name)
    model.base_model.add_weighted_adapter(
        names, list(weights), _COMBINED, combination_type=kind, density=density, majority_sign_method=majority_sign
    )
    require_effect(model, _COMBINED)
    typer.echo(f"The adapter is in {save_adapter(model, out, _COMBINED)}.")
