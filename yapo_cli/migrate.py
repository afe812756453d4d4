"""`yapo migrate`: import vectors of YaPO's and BiPO's published code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options


def migrate(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Files such as vec_ep20_layer15.pt, one per layer.")
    ],
    model: options.Model,
    out: options.NewFolder,
    sae_release: options.SaeRelease = None,
    sae_id: options.SaeId = None,
    sae_path: options.SaePath = None,
    dtype: options.DType = "auto",
) -> None:
    """Import vectors saved by the published code of YaPO or BiPO.

    Pass the SAE for vectors of YaPO, and none for BiPO.

    `yapo migrate vec_ep20_layer15.pt --model google/gemma-2-2b-it --sae-release gemma-scope-2b-pt-res
    --sae-id layer_15/width_65k/average_l0_68 --out polite-gemma`
    """
    from yapo_peft.adapter_file.saving import save_adapter
    from yapo_peft.methods import import_vectors
    from yapo_peft.methods.migrate import layer_of

    from .loading import attach_adapter, require_effect

    steered = attach_adapter(
        model,
        dtype,
        space="dense" if sae_release is None and not sae_path else "sae",
        layers=[layer_of(file) for file in files],
        sae_release=sae_release,
        sae_id=sae_id,
        sae_path=sae_path,
    )
    import_vectors(steered, files)
    require_effect(steered)
    typer.echo(f"Saved to {save_adapter(steered, out)}.")
