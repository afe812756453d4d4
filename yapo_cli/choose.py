"""`yapo choose`: choose layer, SAE and number of features by short trainings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .pairs import PairArguments, TrainingPairs, reads_pairs
from .train import write_config

if TYPE_CHECKING:
    from yapo_peft import YaPOConfig


@reads_pairs()
def choose(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub repository of the model.")],
    data: PairArguments,
    out: Annotated[Path, typer.Option(help="Output folder; a run that was interrupted continues there.")],
    sae_path: Annotated[
        list[str] | None, typer.Option(help="Folder of a local SAE, one candidate each; repeat for more.")
    ] = None,
    sae_release: Annotated[
        str | None,
        typer.Option(help="SAE release in SAELens: all of its SAEs for this model that match --sae-id and --layers."),
    ] = None,
    sae_id: Annotated[
        list[str] | None, typer.Option(help="Only SAEs with this in their id, such as width_16k; repeat for others.")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(metavar="NUMBERS", help="Only SAEs of these layers; without SAEs, dense vectors at each of them."),
    ] = None,
    features: Annotated[
        str | None, typer.Option(metavar="NUMBERS", help="Numbers of features to compare, such as 16,64,all.")
    ] = None,
    eval_split: Annotated[
        str, typer.Option(help="Pairs to measure on: a share of --dataset, a split of it, or another dataset.")
    ] = "0.3",
    max_kl: Annotated[float, typer.Option(help="Damage to compare at: KL in nats per token.")] = 0.1,
    steps: Annotated[int | None, typer.Option(min=8, help="Steps of a full training. Default: three epochs.")] = None,
    positions: options.Positions = "all",
    batch_size: options.BatchSize = 8,
    seed: options.Seed = 0,
    dtype: options.DType = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Choose layer, SAE and number of features for your model and pairs, by short trainings compared at equal damage.

    Writes a table, a plot, and train.yaml with the best, for `yapo train --config`.

    `yapo choose google/gemma-2-2b-it --dataset train.csv --sae-release gemma-scope-2b-pt-res-canonical
    --sae-id width_16k --layers 10,15,20 --out choice`
    """
    from yapo_peft import ConfigError
    from yapo_peft.evaluation import Candidate, plot_choice
    from yapo_peft.evaluation import choose as chosen
    from yapo_peft.evaluation.plots import require_plot_path
    from yapo_peft.scoring.calibration import require_bound

    from .loading import load_model, load_tokenizer
    from .output import plot_title, print_table

    require_plot_path(out / "choice.png")
    require_bound(max_kl)
    options.require_trainable(dtype)
    indices = None if layers is None else options.layer_indices(layers)
    configs = _configs(model, sae_path or [], sae_release, sae_id or [], indices, positions)
    counts = _counts(features)
    tokenizer = load_tokenizer(model)
    pairs, held_out = TrainingPairs(**vars(data), eval_split=eval_split).load_both(tokenizer, seed)
    candidates = [Candidate(config, count) for config in configs for count in counts]
    if len(candidates) < 2:
        raise ConfigError(f"There is one candidate, {candidates[0].name}: name more SAEs, --layers or --features.")
    found = chosen(
        load_model(model, dtype),
        tokenizer,
        candidates,
        pairs,
        held_out,
        out / "trainings",
        max_kl=max_kl,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
    )
    print_table(found.table, as_json)
    found.table.to_csv(out / "choice.csv", index=False)
    plot_choice(found.table, out / "choice.png", plot_title(f"gain at a KL of {max_kl:g}", data.dataset, model))
    defaults = PairArguments()
    given = {name: value for name, value in vars(data).items() if value != getattr(defaults, name)}
    write_config(out / "train.yaml", model, found.best, max_kl=max_kl, dtype=dtype, seed=seed, **given)
    mean, low, high = found.lead
    verdict = "It leads" if low > 0 else "It cannot be told apart from the next one: it leads"
    typer.echo(f"Best: {found.best.name}. {verdict} by {mean:.3g} nats ({low:.3g} to {high:.3g}).", err=True)
    typer.echo(f"Train it with: yapo train --config {out / 'train.yaml'} --output_dir my-adapter", err=True)


def _configs(
    model: str, paths: list[str], release: str | None, ids: list[str], layers: list[int] | None, positions: str
) -> list[YaPOConfig]:
    """The configs of the candidates.

    Raises:
        ConfigError: There are no SAEs and no layers.
        SAENotFoundError: A folder has no SAE, or the release has none that fits.
    """
    from yapo_peft import ConfigError, SAENotFoundError, YaPOConfig
    from yapo_peft.sae import find_saes, load_sae

    if ids and release is None:
        raise ConfigError(f"--sae-id {ids[0]}: pass the --sae-release that it is from.")
    if layers and min(layers) < 0:
        raise ConfigError(f"--layers {min(layers)}: layers are counted from 0 here.")
    found: list[YaPOConfig] = []
    for path in paths:
        layer = load_sae(path=path).block
        if layer is None:
            if layers is None or len(layers) != 1:
                raise ConfigError(f"--sae-path {path}: the SAE does not name its layer; give that one as --layers.")
            layer = layers[0]
        if layers is not None and layer not in layers:
            raise ConfigError(f"--sae-path {path}: the SAE is of layer {layer}, which --layers leaves out.")
        found.append(YaPOConfig(layers=layer, sae_path=path, positions=positions))
    if release is not None:
        wanted = [
            sae
            for sae in find_saes(model)
            if sae.release == release
            and (layers is None or sae.layer in layers)
            and (not ids or any(part in sae.sae_id for part in ids))
        ]
        if not wanted:
            raise SAENotFoundError(f"No SAE of {release!r} has these layers and ids: see `yapo sae list {model}`.")
        found += [
            YaPOConfig(layers=sae.layer, sae_release=release, sae_id=sae.sae_id, positions=positions) for sae in wanted
        ]
    if not paths and release is None:
        if not layers:
            raise ConfigError("There is nothing to choose from: give --sae-path, --sae-release, or --layers.")
        found = [YaPOConfig(layers=layer, space="dense", positions=positions) for layer in layers]
    return found


def _counts(features: str | None) -> list[int | None]:
    try:
        return [None if part.strip() == "all" else int(part) for part in (features or "all").split(",")]
    except ValueError:
        raise typer.BadParameter(f"--features {features}: must be whole numbers or all, such as 16,64,all.") from None
