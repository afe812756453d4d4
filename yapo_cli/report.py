"""`yapo report`: an HTML report about an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .pairs import PairArguments, reads_pairs


@reads_pairs(limit=32)
def report(
    adapter: options.Adapter,
    data: PairArguments,
    text: Annotated[
        Path | None, typer.Option(help="Text file for side effects and contexts. Default: the pairs.")
    ] = None,
    questions: Annotated[
        str | None,
        typer.Option(help="Multiple-choice questions to check knowledge: JSON with question, options and answer."),
    ] = None,
    multipliers: options.Multipliers = options.Numbers((-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)),
    multiplier: Annotated[float, typer.Option(help="Multiplier for features, attribution and answers.")] = 1.0,
    top: Annotated[int, typer.Option(min=1, help="Features to list per layer.")] = 20,
    attributed: Annotated[
        int, typer.Option(min=0, help="Number of features to ablate one by one; 0 skips attribution.")
    ] = 16,
    answers: Annotated[int, typer.Option(min=0, help="Number of prompts to answer.")] = 3,
    labels: Annotated[bool, typer.Option(help="Fetch labels from Neuronpedia.")] = True,
    batch_size: options.BatchSize = 8,
    base: options.BaseModel = None,
    dtype: options.DType = "auto",
    card: Annotated[
        bool, typer.Option("--card", help="Also add the top features and a plot to the adapter's model card.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Output file.")] = Path("report.html"),
) -> None:
    """Evaluate an adapter and write an HTML report: dose-response, side effects, features, attribution and answers.

    The report is one file that works offline.
    """
    from yapo_peft.data import load_choices
    from yapo_peft.report import collect_report, save_page, write_short_form
    from yapo_peft.report.contents import training_history
    from yapo_peft.report.page import require_card, require_page

    from .loading import load_adapter, load_tokenizer

    require_page(out)
    if card:
        require_card(adapter)
    tokenizer = load_tokenizer(adapter, base)
    contents = collect_report(
        dataset=data.load(tokenizer).to_list(),
        text=None if text is None else options.paragraphs(text),
        questions=None if questions is None else load_choices(questions),
        model=load_adapter(adapter, dtype, base),
        tokenizer=tokenizer,
        title=Path(adapter).name,
        dataset_name=Path(str(data.dataset)).name,
        history=training_history(adapter),
        multipliers=multipliers,
        multiplier=multiplier,
        top=top,
        attributed=attributed,
        prompts=answers,
        labels=labels,
        batch_size=batch_size,
    )
    typer.echo(f"Saved to {save_page(contents, out)}.")
    if card:
        typer.echo(f"Updated {write_short_form(contents, adapter)}.")
