"""`yapo lm-eval`: any task of the Language Model Evaluation Harness, at several strengths."""

from __future__ import annotations

import argparse


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="yapo lm-eval", description="Runs tasks of lm-eval on a model with an adapter, at several strengths."
    )
    parser.add_argument("adapter", help="name or path of an adapter")
    parser.add_argument("--tasks", nargs="+", required=True, help="tasks or groups of lm-eval, such as mmlu")
    parser.add_argument("--include_path", help="folder of tasks of one's own")
    parser.add_argument("--multipliers", nargs="+", type=float, default=[0.0, 1.0], help="strengths; 0 is unsteered")
    parser.add_argument("--metric", default="acc", help="metric per document, such as acc, acc_norm, exact_match")
    parser.add_argument("--filter", help="which way to read an answer, for tasks that have several")
    parser.add_argument("--num_fewshot", type=int)
    parser.add_argument("--limit", type=float, help="documents per task, or a share of them")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--apply_chat_template", action="store_true")
    parser.add_argument("--dtype", default="auto", help="of the model's weights, such as bfloat16")
    parser.add_argument("--out", help="JSON file for the metric of each document; read it with Scores.load")
    return parser


def lm_eval(arguments: list[str]) -> int:
    """Measures, prints a table and writes the scores."""
    options = make_parser().parse_args(arguments)
    from peft.utils import infer_device

    from ..evaluation import Scores, sweep_tasks
    from ..evaluation.lm_eval import task_manager
    from ..scripts.loading import load_model

    extra = {}
    if options.include_path is not None:
        extra["task_manager"] = task_manager(options.include_path)
    model, tokenizer = load_model(options.adapter, options.dtype)
    scores = sweep_tasks(
        model.to(infer_device()),
        tokenizer,
        options.tasks,
        options.multipliers,
        metric=options.metric,
        filter=options.filter,
        batch_size=options.batch_size,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        apply_chat_template=options.apply_chat_template,
        **extra,
    )
    print(scores.summary().to_string(index=False))
    if len(set(scores.table["task"])) > 1:
        whole = Scores(scores.table.assign(task="all", example=range(len(scores.table))), scores.metrics)
        print(whole.summary().to_string(index=False))
    if options.out is not None:
        print(f"The scores of each document are in {scores.save(options.out)}.")
    return 0
