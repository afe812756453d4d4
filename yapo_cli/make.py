"""`yapo make`: an adapter from a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options
from .data import contrast
from .report import report
from .train import launch, write_config

# Share of the pairs that the report is about.
_HELD_OUT = 0.2
# Answers per file, which an interruption can lose.
_SHARD = 64


def make(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub repository of a chat model.")],
    towards: Annotated[str, typer.Option(help="What to steer towards, as in 'answers in short plain sentences'.")],
    away: Annotated[str, typer.Option(help="The opposite, as in 'answers in long flowery sentences'.")],
    layers: options.Layers,
    out: Annotated[Path, typer.Option(help="Output folder; a run that was interrupted continues there.")],
    sae_release: options.SaeRelease = None,
    sae_id: options.SaeId = None,
    sae_path: options.SaePath = None,
    features: Annotated[int, typer.Option(min=2, help="Number of SAE features that the adapter may move.")] = 64,
    max_kl: Annotated[float, typer.Option(help="Damage at multipliers +1 and -1: KL in nats per token.")] = 0.1,
    questions: Annotated[
        str | None, typer.Option(help="Questions, as for `yapo data contrast`. Default: those that are built in.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=10, help="Maximum number of questions. Default: all.")] = None,
    max_new_tokens: options.MaxNewTokens = 128,
    batch_size: options.BatchSize = 8,
    seed: options.Seed = 0,
    dtype: options.DType = "auto",
) -> None:
    """Make an adapter from two descriptions: create pairs, train, and report, in one go.

    Runs `yapo data contrast`, `yapo train` and `yapo report`. Without an SAE, the adapter is a dense vector.

    `yapo make google/gemma-2-2b-it --towards "answers in short plain sentences"
    --away "answers in long flowery sentences" --layers 15 --sae-release gemma-scope-2b-pt-res
    --sae-id layer_15/width_65k/average_l0_68 --out plain`
    """
    import gc

    from accelerate.utils.memory import clear_device_cache

    from yapo_peft import YaPOConfig
    from yapo_peft.evaluation import Candidate
    from yapo_peft.report.page import require_page
    from yapo_peft.scoring.calibration import require_bound

    from .loading import load_saes

    saes: dict[str, Any] = {"sae_release": sae_release, "sae_id": sae_id, "sae_path": sae_path}
    given = {name: value for name, value in saes.items() if value}
    # Checked before hours of work, of which nothing is to be recorded if it cannot be done.
    options.require_trainable(dtype)
    require_bound(max_kl)
    require_page(out / "report.html")
    config = YaPOConfig(layers=options.layer_indices(layers), space="sae" if given else "dense", **given)
    load_saes(model, config)
    asked = {"model": model, "towards": towards, "away": away, "questions": questions, "limit": limit, "seed": seed}
    adapter = {"model": model, "layers": layers, **given, "features": features, "max_kl": max_kl, "dtype": dtype}
    pairs, trained = out / "train.parquet", out / "adapter" / "adapter_config.json"
    _begin(out / "pairs.json", asked | {"max_new_tokens": max_new_tokens}, pairs)
    _begin(out / "adapter.json", adapter, trained)
    if not pairs.is_file():
        contrast(
            model=model,
            towards=towards,
            away=away,
            output_dir=out / "pairs",
            questions=questions,
            limit=limit,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            shard_size=_SHARD,
            seed=seed,
            dtype=dtype,
        )
        _split(out, seed)
        # The training runs in a process of its own.
        gc.collect()
        clear_device_cache()
    if not trained.is_file():
        candidate = Candidate(config, features if given else None)
        write_config(out / "train.yaml", model, candidate, max_kl=max_kl, dtype=dtype, seed=seed, dataset=str(pairs))
        files = ["--config", str(out / "train.yaml"), "--output_dir", str(out / "adapter")]
        status = launch([*files, "--cache_activations", "True", "--save_strategy", "no", "--report_to", "none"])
        if status:
            raise typer.Exit(status)
    report(
        adapter=str(out / "adapter"),
        dataset=str(out / "test.parquet"),
        batch_size=batch_size,
        dtype=dtype,
        card=True,
        out=out / "report.html",
    )
    typer.echo(f"The adapter is in {out / 'adapter'}, a page about it in {out / 'report.html'}.")


def _begin(file: Path, arguments: dict[str, Any], made: Path) -> None:
    """Records what something is made of. Raises `ConfigError` if it is made already, of something else."""
    from yapo_peft._utils import begin_or_resume

    if not made.is_file():
        file.unlink(missing_ok=True)
    begin_or_resume(file, arguments)


def _split(out: Path, seed: int) -> None:
    """Saves the pairs to train on, and those that are held out."""
    from datasets import load_dataset

    from yapo_peft import DatasetError
    from yapo_peft._utils import replacing

    pairs: Any = load_dataset("parquet", data_files=str(out / "pairs" / "pairs-*.parquet"), split="train")
    count = round(_HELD_OUT * len(pairs))
    if not 0 < count < len(pairs):
        raise DatasetError(f"{len(pairs)} pairs are too few to train on some and report on others: ask more questions.")
    parts = pairs.train_test_split(count, seed=seed)
    for name in ("test", "train"):
        with replacing(out / f"{name}.parquet") as partial:
            parts[name].to_parquet(str(partial))
