"""`yapo compare-features`: the features that adapters share, and those that they do not."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options


def compare_features(
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER...", help="Two or more adapters of the same model.")
    ],
    top: Annotated[int, typer.Option(min=1, help="Features to list per layer, by reach.")] = 20,
    features: Annotated[int, typer.Option(min=1, help="Number of features to decompose a dense vector into.")] = 32,
    base: options.BaseModel = None,
    dtype: options.DType = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Show how many features adapters share, how similar their vectors are, and each feature's entry in every adapter.

    `yapo compare-features my-adapter another-adapter --top 10`
    """
    from yapo_peft.interpret import compare
    from yapo_peft.interpret import compare_features as compared

    from .loading import load_together
    from .lookup import require_one_model
    from .output import print_json, print_table, records

    if len(adapters) < 2:
        raise typer.BadParameter(f"{adapters[0]}: pass at least two adapters.")
    short = options.short_names(adapters)
    if base is None:
        require_one_model(adapters)
    _require_same_saes(adapters)
    model, names = load_together(adapters, dtype, base)
    said = dict(zip(names, short, strict=True))
    listed = compared(model, names, top=top, features=features).rename(columns=said)
    pairs = compare(model, names, features=features).drop(columns="effect_correlation").replace({"a": said, "b": said})
    if as_json:
        return print_json({"adapters": records(pairs), "features": records(listed)})
    if pairs.empty:
        typer.echo("The adapters have no layer in common.")
    else:
        known = pairs.dropna(axis="columns", how="all")
        print_table(known, as_json)
        undefined = [name for name in pairs if name not in known]
        if undefined:
            typer.echo(
                f"Not defined for these adapters: {', '.join(undefined)}. At multiplier 1, a code adds its entries "
                "above 0 to every token, at -1 those below 0; without any, there is no cosine."
            )
    if not listed.empty:
        typer.echo()
        print_table(listed, as_json)


def _require_same_saes(adapters: list[str]) -> None:
    """Raises `ConfigError` if one holds features at values, or two have different SAEs at a layer."""
    from yapo_peft import ConfigError
    from yapo_peft.adapter_file.reading import SavedAdapter

    seen: dict[int, tuple[str, str]] = {}
    for adapter in adapters:
        saved = SavedAdapter(adapter)
        if saved.config.mode == "clamp":
            raise ConfigError(f"{adapter} holds features at values (mode='clamp'): use yapo explain for it.")
        for layer, identity in saved.identities.items():
            if identity is None:
                continue
            first, known = seen.setdefault(layer, (adapter, identity.content_hash))
            if identity.content_hash != known:
                raise ConfigError(
                    f"{first} and {adapter} have different SAEs at layer {layer}, so that their features are not the "
                    "same: compare their effects with `yapo compare`."
                )
