"""`yapo eval`: tasks of the Language Model Evaluation Harness at several multipliers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options


def evaluate(
    adapter: options.Adapter,
    tasks: Annotated[str, typer.Option(help="Comma-separated tasks or groups of lm-eval, such as mmlu.")],
    multipliers: options.Multipliers = options.Numbers((0.0, 1.0)),
    include_path: Annotated[str | None, typer.Option(help="Folder with custom tasks.")] = None,
    metric: Annotated[str, typer.Option(help="Metric to report, such as acc, acc_norm or exact_match.")] = "acc",
    filter: Annotated[str | None, typer.Option(help="Answer filter, for tasks that have several.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Number of few-shot examples.")] = None,
    limit: Annotated[
        float | None, typer.Option(help="Maximum number of documents per task, or a fraction of them.")
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Apply the chat template.")
    ] = False,
    batch_size: options.BatchSize = 8,
    base: options.BaseModel = None,
    dtype: options.DType = "auto",
    out: Annotated[
        Path | None, typer.Option(help="Save each document's metric to this JSON file (see `Scores.load`).")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Run lm-eval tasks at several multipliers, with 95 % intervals.

    `yapo eval my-adapter --tasks mmlu --multipliers 0,1 --num-fewshot 5`
    """
    import pandas as pd

    from yapo_peft.evaluation import Scores, sweep_tasks
    from yapo_peft.evaluation.lm_eval import task_manager

    from .loading import load_adapter, load_tokenizer
    from .output import print_table

    scores = sweep_tasks(
        load_adapter(adapter, dtype, base),
        load_tokenizer(adapter, base),
        tasks.split(","),
        multipliers,
        metric=metric,
        filter=filter,
        batch_size=batch_size,
        num_fewshot=num_fewshot,
        limit=limit,
        apply_chat_template=apply_chat_template,
        task_manager=task_manager(include_path),
    )
    if out is not None:
        scores.save(out)
    table = scores.summary()
    if len(set(scores.table["task"])) > 1:
        whole = Scores(scores.table.assign(task="all", example=range(len(scores.table))), scores.metrics)
        table = pd.concat([table, whole.summary()])
    print_table(table, as_json)
