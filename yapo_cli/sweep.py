"""`yapo sweep`: measure adapters over multipliers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from . import options
from .pairs import PairArguments, reads_pairs

Measure = Literal["preference", "choice", "generated", "repetition", "judge", "damage"]
# The options of pairs that a measure does not read.
_UNREAD = {
    "preference": (),
    "choice": ("chosen", "rejected", "system", "plain"),
    "generated": ("chosen", "rejected", "system", "plain"),
    "repetition": ("chosen", "rejected", "options", "answer"),
    "judge": ("chosen", "rejected", "options", "answer"),
    "damage": ("chosen", "rejected", "system", "plain", "prompt", "options", "answer", "where", "split"),
}


@reads_pairs()
def sweep(
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER...",
            help="Folders or Hub repositories of adapters. A folder of checkpoints stands for all of them.",
        ),
    ],
    data: PairArguments,
    measure: Annotated[
        Measure,
        typer.Option(
            help="preference: margin and accuracy on pairs. choice, generated: accuracy on multiple-choice questions, "
            "by log-probabilities or by generated answers. repetition, judge: of answers to prompts. damage: KL on a "
            "text file, in blocks of 256 tokens."
        ),
    ] = "preference",
    multipliers: options.Multipliers = options.Numbers((-2.0, -1.0, 0.0, 1.0, 2.0)),
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum length of a generated answer in tokens. Default: 64.")
    ] = None,
    judge_url: Annotated[
        str | None,
        typer.Option(
            help="Server of the judge, with OpenAI's chat completions, such as http://localhost:8000/v1; its key is "
            "read from JUDGE_API_KEY."
        ),
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="Model of the judge, for a server with several.")] = None,
    judge_cache: Annotated[Path | None, typer.Option(help="JSON-lines file that keeps the judge's scores.")] = None,
    behaviour: Annotated[
        str | None,
        typer.Option(
            help="What the judge scores: power-seeking, wealth-seeking, hallucination, jailbreak, culture, coherence, "
            "or a description of what an answer with the highest score does."
        ),
    ] = None,
    opposite: Annotated[
        str | None, typer.Option(help="What an answer with the lowest score does, for a behaviour of your own.")
    ] = None,
    batch_size: options.BatchSize = 8,
    base: options.BaseModel = None,
    dtype: options.DType = "auto",
    out: Annotated[
        Path | None,
        typer.Option(help="Save each example's metrics, of all adapters, to this JSON file (see `Scores.load`)."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Save a plot, such as doses.png.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure adapters over a range of multipliers, with 95 % intervals.

    Several adapters are in one table, with a column that names them, and are lines of one plot.

    `yapo sweep my-adapter --dataset test.csv --prompt question --chosen matching --rejected not_matching`
    """
    from yapo_peft import Scores, plot_dose_response
    from yapo_peft import sweep as measured
    from yapo_peft.evaluation.plots import require_dose_response, require_plot_path

    from .loading import with_each_adapter
    from .output import plot_title, print_table

    adapters = options.with_checkpoints(adapters)
    names = dict(zip(adapters, options.short_names(adapters), strict=True))
    source = cast(str, data.dataset)
    data.require_defaults(*_UNREAD[measure], why=f"--measure {measure} does not read it.")
    judging = {"url": judge_url, "model": judge_model, "cache": judge_cache}
    asked = {**{f"judge-{name}": value for name, value in judging.items()}, "behaviour": behaviour}
    _require_read(measure, {**asked, "opposite": opposite}, max_new_tokens)
    if measure == "damage":
        _require_text(Path(source))
    if out is not None and out.is_dir():
        raise typer.BadParameter(f"--out {out} is a folder: pass a file.")
    if plot is not None:
        require_plot_path(plot)
        require_dose_response(multipliers)
    what = _measure(measure, data, judging, behaviour, opposite)
    generation: dict[str, Any] = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    parts: list[Scores] = []
    models: set[str] = set()

    def read(tokenizer: Any) -> Any:
        if measure == "damage":
            return [options.read_text(Path(source))]
        if measure in ("choice", "generated"):
            return data.load_questions()
        return data.load(tokenizer) if measure == "preference" else data.load_prompts(tokenizer)

    def add(adapter: str, model: Any, tokenizer: Any, rows: Any) -> None:
        scores = measured(model, rows, tokenizer, multipliers, measure=what, batch_size=batch_size, **generation)
        parts.append(scores if len(adapters) == 1 else scores.labelled(adapter=names[adapter]))
        models.add(model.config.name_or_path)
        if out is not None:  # what is done is not lost if the next adapter fails
            Scores.concat(parts).save(out)

    with_each_adapter(adapters, read, add, dtype, base)
    scores = Scores.concat(parts)
    print_table(scores.summary(), as_json)
    if out is not None:
        typer.echo(f"Saved to {out}.", err=True)
    if plot is not None:
        of = f"{names[adapters[0]]}: {measure}" if len(adapters) == 1 else measure
        saved = plot_dose_response(scores, plot, plot_title(of, source, *models))
        typer.echo(f"Saved to {saved}.", err=True)


def _measure(
    name: Measure, data: PairArguments, judging: dict[str, Any], behaviour: str | None, opposite: str | None
) -> Any:
    from yapo_peft.evaluation import Damage, GeneratedChoice, Judge, MultipleChoice, Repetition

    if name == "judge":
        from huggingface_hub import InferenceClient

        # Self-hosted servers accept any key.
        client = InferenceClient(base_url=judging["url"], api_key=os.environ.get("JUDGE_API_KEY", "none"))
        return Judge(client, behaviour or "", opposite, model=judging["model"], cache=judging["cache"])
    if name == "damage":
        return Damage(max_blocks=data.limit)
    choice = MultipleChoice("text", "characters")
    return {"preference": None, "choice": choice, "generated": GeneratedChoice(), "repetition": Repetition()}[name]


def _require_read(measure: Measure, judging: dict[str, Any], max_new_tokens: int | None) -> None:
    """Raises `typer.BadParameter` for an option that the measure does not read, or lacks."""
    given = [name for name, value in judging.items() if value is not None]
    if measure != "judge" and given:
        raise typer.BadParameter(f"--{given[0]}: --measure {measure} does not read it.")
    if measure not in ("generated", "repetition", "judge") and max_new_tokens is not None:
        raise typer.BadParameter(f"--max-new-tokens: --measure {measure} does not generate.")
    missing = [name for name in ("judge-url", "behaviour") if name not in given]
    if measure == "judge" and missing:
        raise typer.BadParameter(f"--measure judge needs --{missing[0]}.")


def _require_text(file: Path) -> None:
    from yapo_peft.data.sources import BUILDERS

    if file.suffix.lower() in BUILDERS:
        raise typer.BadParameter(f"--dataset {file}: damage is measured on running text: pass a plain text file.")
