"""`yapo sae`: find, describe, measure and train SAEs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options, sae_train

app = typer.Typer(no_args_is_help=True, help="Find SAEs for a model, measure them, and train new ones.")
app.command()(sae_train.train)
app.command()(sae_train.measure)


@app.command("list")
def list_(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub repository of the model.")],
    layer: Annotated[int | None, typer.Option(min=0, help="Layer whose output they read; default: all.")] = None,
    release: Annotated[str | None, typer.Option(help="Only list releases whose name contains this.")] = None,
    sae_id: Annotated[str | None, typer.Option("--id", help="Only ids with this in them, such as width_65k.")] = None,
    sizes: Annotated[bool, typer.Option("--sizes", help="Ask the Hub how large they are, in bytes.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """List the SAEs of sae-lens' directory that read the output of a model's layers.

    SAEs of its base model or of a sibling are listed too: see the column `model`. L0 is as published; what is not known
    is left empty. The directory has no widths: they are in the ids, or see `yapo sae inspect` and --sizes.

    `yapo sae list google/gemma-2-2b-it --layer 15 --id width_65k`
    """
    import pandas as pd

    from yapo_peft import SAENotFoundError
    from yapo_peft.sae import find_saes
    from yapo_peft.sae.directory import size_on_hub

    from .output import print_table

    found = [s for s in find_saes(model, layer) if (release or "") in s.release and (sae_id or "") in s.sae_id]
    if not found:
        raise SAENotFoundError("No SAE matches: leave out --layer, --release or --id.")
    table = pd.DataFrame([vars(sae) for sae in found])
    if sizes:
        table["bytes"] = [size_on_hub(sae.release, sae.sae_id) for sae in found]
    if not as_json:
        table = table.drop(columns="is_of_model").dropna(axis="columns", how="all")
    print_table(table, as_json)


@app.command()
def inspect(
    sae: Annotated[str, typer.Argument(metavar="RELEASE|FOLDER", help="A release, or a local folder.")],
    sae_id: Annotated[str | None, typer.Argument(metavar="ID", help="SAE in the release.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Describe an SAE: its entry in the directory and, when online, its size on the Hub; or the one in a folder.

    `yapo sae inspect gemma-scope-2b-pt-res layer_15/width_65k/average_l0_68`
    """
    from yapo_peft.sae.directory import describe_sae

    from .output import print_json

    if sae_id is not None and Path(sae).is_dir():
        raise typer.BadParameter(f"{sae} is a folder, which holds one SAE: leave out the id.")
    facts = _of_folder(sae) if sae_id is None else describe_sae(sae, sae_id)
    if as_json:
        return print_json(facts)
    for name, value in facts.items():
        typer.echo(f"{name:14} {'unknown' if value is None else value}")


def _of_folder(path: str) -> dict[str, Any]:
    from yapo_peft import SAENotFoundError
    from yapo_peft.sae import load_sae

    if not Path(path).is_dir():
        raise SAENotFoundError(
            f"There is no folder {path!r}. If it is a release, give an id too, as `yapo sae list` shows them."
        )
    found = load_sae(path=path)
    size = sum(file.stat().st_size for file in Path(path).iterdir() if file.is_file())
    return {"folder": path, "reads": found.hook_name, **found.identity.to_dict(), "bytes": size}
