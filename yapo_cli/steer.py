"""`yapo steer`: make or edit an adapter by hand."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from . import options


def steer(
    source: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder or Hub repository of a model, or of an adapter to edit.")
    ],
    feature: Annotated[
        list[str],
        typer.Option(
            metavar="LAYER:FEATURE=VALUE",
            help="What multiplier 1 adds to a feature's activation, such as 14:1965=8; with --mode clamp, what it is "
            "held at. =none takes the feature out of an adapter. Repeat for more.",
        ),
    ],
    out: options.NewFolder,
    mode: Annotated[
        str | None, typer.Option(help="add (the default), or clamp to hold features at values: 0 turns one off.")
    ] = None,
    sae_release: options.SaeRelease = None,
    sae_id: options.SaeId = None,
    sae_path: options.SaePath = None,
    positions: Annotated[
        str | None,
        typer.Option(help="Tokens to steer: all, completion, last, prompt, or a slice such as prompt[-4:]."),
    ] = None,
    base: options.BaseModel = None,
    dtype: options.DType = "auto",
) -> None:
    """Steer chosen SAE features, without training: make an adapter of a model, or edit one.

    `yapo steer google/gemma-2-2b-it --feature 15:1965=8 --sae-release ... --sae-id ... --out my-adapter`
    """
    from yapo_peft import model_card
    from yapo_peft.adapter_file.saving import save_adapter
    from yapo_peft.methods import set_features

    from .loading import attach_adapter, has_effect, load_adapter
    from .lookup import is_adapter

    features = _read(feature)
    if is_adapter(source):
        given = {
            "--mode": mode,
            "--sae-release": sae_release,
            "--sae-id": sae_id,
            "--sae-path": sae_path,
            "--positions": positions,
        }
        unread = [name for name, value in given.items() if value]
        if unread:
            raise typer.BadParameter(f"{unread[0]}: the adapter {source} has its own, which cannot be changed.")
        model = load_adapter(source, dtype, base)
        _require_steered(model, features)
    else:
        if base is not None:
            raise typer.BadParameter(f"--model {base}: {source} is a model.")
        saes: dict[str, Any] = {"sae_release": sae_release, "sae_id": sae_id, "sae_path": sae_path}
        model = attach_adapter(
            source, dtype, layers=sorted(features), positions=positions or "all", mode=mode or "add", **saes
        )
    set_features(model, features)
    if not has_effect(model):
        zero = any(0.0 in values.values() for values in features.values())
        hint = " A value of 0 adds nothing; with --mode clamp it turns a feature off." if zero else ""
        raise typer.BadParameter(f"--feature {' '.join(feature)}: no feature is left that the adapter steers.{hint}")
    folder = save_adapter(model, out)
    model_card(model, features=_effects(model, source, base)).save(folder / "README.md")
    typer.echo(f"Saved to {folder}.")


def _require_steered(model: Any, features: dict[int, dict[int, float | None]]) -> None:
    """Raises `typer.BadParameter` if a feature is to be taken out that the adapter does not steer."""
    from yapo_peft.tuner.adapters import steered_layers

    codes = {layer.index: layer.code("default") for layer in steered_layers(model)}
    for layer, values in features.items():
        for feature, value in values.items():
            is_known = layer in codes and 0 <= feature < len(codes[layer])  # or else `set_features` says so
            if value is None and is_known and not codes[layer][feature]:
                raise typer.BadParameter(f"--feature {layer}:{feature}=none: the adapter does not steer this feature.")


def _effects(model: Any, source: str, base: str | None) -> Any:
    """What `explain` says of the features; None if the model has no tokenizer, or no head."""
    from yapo_peft import YaPOError
    from yapo_peft.interpret import explain

    from .loading import load_tokenizer

    try:
        return explain(model, tokenizer=load_tokenizer(source, base))
    except (OSError, YaPOError):
        return None


def _read(texts: list[str]) -> dict[int, dict[int, float | None]]:
    """Reads "14:1965=8"."""
    found: dict[int, dict[int, float | None]] = {}
    for text in texts:
        place, _, value = text.partition("=")
        layer, _, index = place.partition(":")
        try:
            entry = int(layer), int(index), None if value == "none" else float(value)
        except ValueError:
            raise typer.BadParameter(f"--feature {text}: must be LAYER:FEATURE=VALUE, such as 14:1965=8.") from None
        if entry[0] < 0:
            raise typer.BadParameter(f"--feature {text}: layers are counted from 0, upwards.")
        if entry[1] in found.setdefault(entry[0], {}):
            raise typer.BadParameter(f"--feature {text}: the feature is given twice.")
        found[entry[0]][entry[1]] = entry[2]
    return found
