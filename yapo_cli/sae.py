"""`yapo sae`: find, describe, measure and train SAEs."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, zip_longest
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options

app = typer.Typer(no_args_is_help=True, help="Find SAEs for a model, measure them, and train new ones.")

Dataset = Annotated[
    list[str],
    typer.Option(
        metavar="SOURCE[:COLUMNS]",
        help="Text: a text file, a CSV, JSON or Parquet file, a saved dataset, or a Hub dataset, whose config may "
        "follow, as ORG/NAME/CONFIG. After a colon, the column of texts or conversations; or those of prompts and of "
        "answers, as pairs.csv:prompt:chosen,rejected. Repeat for more, which are read in turn.",
    ),
]
Split = Annotated[str, typer.Option(help="Split of Hub or saved datasets.")]
Device = Annotated[str | None, typer.Option(help="Device, such as cuda:1; default: the fastest available.")]
_FROM = typer.Option(
    "--from", metavar="FOLDER|RELEASE:ID", help="SAE to continue with, such as one of the base model; one per layer."
)


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


@app.command()
def train(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub repository of the model or adapter.")],
    dataset: Dataset,
    out: Annotated[Path, typer.Option(help="Output folder; the same call again goes on where it was interrupted.")],
    layers: Annotated[
        str | None, typer.Option(metavar="NUMBERS", help="Layers, such as 14 or 12,15; default: those of --from.")
    ] = None,
    start: Annotated[list[str] | None, _FROM] = None,
    architecture: Annotated[
        str | None,
        typer.Option(help="batchtopk (the default), matryoshka_batchtopk, jumprelu or topk."),
    ] = None,
    d_sae: Annotated[int | None, typer.Option(help="Number of features. Default: 8 times the model's width.")] = None,
    l0: Annotated[float | None, typer.Option(help="Active features per token. Default: 50.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to train on; shorter text is used several times.")] = 4_000_000,
    batch_size: Annotated[int, typer.Option(help="Tokens per training step.")] = 4096,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of Adam.")] = 3e-4,
    context: Annotated[int, typer.Option(help="Tokens per sequence.")] = 256,
    buffer: Annotated[int, typer.Option(help="Tokens whose activations are shuffled together.")] = 1 << 17,
    forward_batch_size: Annotated[int, typer.Option(help="Sequences per forward pass of the model.")] = 32,
    eval_split: Annotated[float, typer.Option(help="Share of the text to hold out for evaluation.")] = 0.05,
    split: Split = "train",
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in mixed precision.")] = False,
    sae_dtype: Annotated[str, typer.Option(help="dtype to save in: float32, bfloat16 or float16.")] = "float32",
    store: Annotated[
        Path | None, typer.Option(help="Folder to store activations in, for text used repeatedly.")
    ] = None,
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints; 0 for none.")] = 500,
    report_to: Annotated[str, typer.Option(help="wandb or none.")] = "none",
    seed: options.Seed = 0,
    device: Device = None,
    dtype: options.DType = "auto",
) -> None:
    """Train SAEs on the outputs of a model's layers, and measure them on held-out text.

    `yapo sae train my-org/my-model --layers 14 --dataset corpus.txt --dataset chats.jsonl:messages --out my-saes`
    """
    from yapo_peft.sae.frozen import layer_read
    from yapo_peft.sae.loader import read_sae
    from yapo_peft.sae_training import SAETrainingConfig, train_saes

    started = [read_sae(**_source(text)) for text in start or []]
    read = [layer_read(sae.cfg.metadata.hook_name) for sae in started]
    if layers is None and (not read or None in read):
        raise typer.BadParameter("pass --layers, such as 14, or --from an SAE that says which layer it reads.")
    chosen: list[Any] = read if layers is None else options.layer_indices(layers)
    if started and len(chosen) != len(started):
        raise typer.BadParameter(f"--from is given {len(started)} times for {len(chosen)} layers: pass one per layer.")
    for layer, reads in zip(chosen, read, strict=False):
        if reads is not None and layer >= 0 and reads != layer:
            raise typer.BadParameter(f"--layers {layers}: the SAE of --from for layer {layer} reads layer {reads}.")
    config = SAETrainingConfig(
        chosen,
        architecture=architecture,
        d_sae=d_sae,
        l0=l0,
        tokens=tokens,
        batch_size=batch_size,
        learning_rate=learning_rate,
        context=context,
        buffer=buffer,
        forward_batch_size=forward_batch_size,
        eval_split=eval_split,
        bf16=bf16,
        dtype=sae_dtype,
        store=None if store is None else str(store),
        save_steps=save_steps,
        report_to=report_to,
        seed=seed,
    )
    loaded, tokenizer, texts = _load(model, dtype, device, dataset, split)
    start_by_layer = dict(zip(chosen, started, strict=True)) if started else None
    measures = train_saes(loaded, tokenizer, texts, config, out, start=start_by_layer)
    for layer, found in measures.items():
        typer.echo(f"{out / f'layer_{layer}'}: {_summary(found)}")
    typer.echo(f"{out / 'README.md'} has all measures.")


@app.command()
def measure(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub repository of the model or adapter.")],
    sae: Annotated[str, typer.Argument(metavar="FOLDER|RELEASE:ID", help="A local SAE, or one of a release.")],
    dataset: Dataset,
    layer: Annotated[int | None, typer.Option(help="Layer it reads. Default: the one it was trained on.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to measure on; whole sequences.")] = 100_000,
    context: Annotated[int, typer.Option(help="Tokens per sequence.")] = 256,
    split: Split = "train",
    batch_size: options.BatchSize = 32,
    device: Device = None,
    dtype: options.DType = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Measure how well an SAE fits a model: explained variance, L0, dead features, and the loss with its output.

    `yapo sae measure google/gemma-2-2b-it gemma-scope-2b-pt-res:layer_15/width_16k/average_l0_78 --dataset wiki.txt`
    """
    from yapo_peft.sae.frozen import layer_read
    from yapo_peft.sae.loader import read_sae
    from yapo_peft.sae_training import measure_sae

    from .output import print_json

    source = _source(sae)
    own = None if layer is None else layer_read(read_sae(**source).cfg.metadata.hook_name)
    if own not in (None, layer):
        typer.echo(f"yapo sae measure: warning: the SAE was trained on layer {own}, not on {layer}.", err=True)
    loaded, tokenizer, texts = _load(model, dtype, device, dataset, split)
    found = measure_sae(
        loaded, tokenizer, texts, **source, layer=layer, tokens=tokens, context=context, batch_size=batch_size
    )
    if as_json:
        return print_json(found)
    for name, value in found.items():
        typer.echo(f"{name:26} {value:.4g}" if name != "tokens" else f"{name:26} {value:,}")


def _summary(found: dict[str, float]) -> str:
    return (
        f"explained variance {found['explained_variance']:.3f}, L0 {found['l0']:.1f}, dead features "
        f"{found['dead_features']:.1%}, loss recovered {found['loss_recovered']:.3f}"
    )


def _source(text: str) -> dict[str, str]:
    """Reads a folder, or RELEASE:ID."""
    release, colon, sae_id = text.partition(":")
    if Path(text).is_dir() or not colon:
        return {"path": text}
    return {"release": release, "sae_id": sae_id}


def _load(name: str, dtype: str, device: str | None, sources: list[str], split: str) -> tuple[Any, Any, Iterable[Any]]:
    """Loads a model, its tokenizer, and the texts of several sources, in turn."""
    from .loading import load_model, load_tokenizer
    from .texts import texts_of

    tokenizer, missing = load_tokenizer(name), object()
    each = [texts_of(source, split, bool(getattr(tokenizer, "chat_template", None))) for source in sources]
    texts = (text for text in chain.from_iterable(zip_longest(*each, fillvalue=missing)) if text is not missing)
    return load_model(name, dtype, device=device), tokenizer, texts
