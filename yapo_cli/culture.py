"""`yapo culture`: cultural alignment by country, over multipliers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from . import options
from .pairs import PairArguments, reads_pairs

# The names of both kinds in the paper's data and in ours.
_KINDS = {"localized": "localized", "nonlocalized": "nonlocalized", "nolocalized": "nonlocalized"}


@reads_pairs("chosen", "rejected", "system", "plain")
def culture(
    adapter: options.Adapter,
    data: PairArguments,
    country: Annotated[str, typer.Option(help="Column with the country of a question.")] = "country",
    status: Annotated[
        str, typer.Option(help="Column with localized (the question names the country) or nonlocalized.")
    ] = "localization_status",
    measure: Annotated[
        Literal["choice", "generated"], typer.Option(help="By log-probabilities, or by generated answers.")
    ] = "choice",
    multipliers: options.Multipliers = options.Numbers((-1.0, 0.0, 1.0)),
    batch_size: options.BatchSize = 8,
    base: options.BaseModel = None,
    dtype: options.DType = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Measure accuracy on localized and nonlocalized questions by country, with RCA and PNLG and 95 % intervals.

    `yapo culture my-adapter --dataset questions.jsonl --where split=test`
    """
    from yapo_peft import DatasetError, Scores, sweep
    from yapo_peft.data import where
    from yapo_peft.evaluation import GeneratedChoice, MultipleChoice, cultural_scores

    from .loading import load_adapter, load_tokenizer
    from .output import print_table

    tokenizer = load_tokenizer(adapter, base)
    questions = data.load_questions(country, status)
    unknown = sorted({str(kind) for kind in questions.unique(status)} - set(_KINDS))
    if unknown:
        raise DatasetError(f"The column {status!r} has {unknown[0]!r}: must be localized or nonlocalized.")
    model = load_adapter(adapter, dtype, base)
    what: Any = MultipleChoice("text", "characters") if measure == "choice" else GeneratedChoice()
    parts: list[Any] = []
    for place in questions.unique(country):
        of_country = where(questions, **{country: place})
        for kind in of_country.unique(status):
            rows = where(of_country, **{status: kind})
            scores = sweep(model, rows, tokenizer, multipliers, measure=what, batch_size=batch_size)
            parts.append(scores.labelled(country=place, localization_status=_KINDS[kind]))
    print_table(cultural_scores(Scores.concat(parts)), as_json)
