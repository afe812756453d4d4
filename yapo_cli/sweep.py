"""`yapo sweep`: measure an adapter over multipliers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from . import options
from .pairs import PairArguments, reads_pairs


@reads_pairs()
def sweep(
    adapter: options.Adapter,
    data: PairArguments,
    measure: Annotated[
        Literal["preference", "choice", "damage"],
        typer.Option(
            help="Margin and accuracy on pairs, accuracy on multiple-choice questions, or KL on a text file, in "
            "blocks of 256 tokens."
        ),
    ] = "preference",
    multipliers: options.Multipliers = options.Numbers((-2.0, -1.0, 0.0, 1.0, 2.0)),
    batch_size: options.BatchSize = 8,
    base: options.BaseModel = None,
    dtype: options.DType = "auto",
    out: Annotated[
        Path | None, typer.Option(help="Save each example's metrics to this JSON file (see `Scores.load`).")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Save a plot, such as doses.png.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure an adapter over a range of multipliers, with 95 % intervals.

    `yapo sweep my-adapter --dataset test.csv --prompt question --chosen matching --rejected not_matching`
    """
    from yapo_peft import plot_dose_response
    from yapo_peft import sweep as measured
    from yapo_peft.data.sources import BUILDERS
    from yapo_peft.evaluation import Damage, MultipleChoice
    from yapo_peft.evaluation.plots import require_dose_response, require_plot_path

    from .loading import load_adapter, load_tokenizer
    from .output import print_table

    if measure != "preference":
        unread = ("chosen", "rejected", "system", "plain")
        unread += ("prompt", "options", "answer", "where") if measure == "damage" else ()
        data.require_defaults(*unread, why=f"--measure {measure} does not read it.")
    source = cast(str, data.dataset)
    if measure == "damage" and Path(source).suffix in BUILDERS:
        raise typer.BadParameter(f"--dataset {source}: damage is measured on running text: pass a plain text file.")
    if out is not None and out.is_dir():
        raise typer.BadParameter(f"--out {out} is a folder: pass a file.")
    if plot is not None:
        require_plot_path(plot)
        require_dose_response(multipliers)
    tokenizer = load_tokenizer(adapter, base)
    if measure == "damage":
        rows = [options.read_text(Path(source))]
    else:
        rows = data.load_questions() if measure == "choice" else data.load(tokenizer)
    model = load_adapter(adapter, dtype, base)
    what = {"preference": None, "choice": MultipleChoice("text", "characters"), "damage": Damage(max_blocks=data.limit)}
    scores = measured(model, rows, tokenizer, multipliers, measure=what[measure], batch_size=batch_size)
    print_table(scores.summary(), as_json)
    if out is not None:
        scores.save(out)
    if plot is not None:
        plot_dose_response(scores, plot, f"{Path(adapter).name}: {measure}")
