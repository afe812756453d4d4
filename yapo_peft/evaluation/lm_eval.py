"""Any task of the Language Model Evaluation Harness, for a steered model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import pandas as pd
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError, UnsupportedOperationError
from ..tuner import steering
from ..tuner.strength import steered_layers
from .scores import Scores


def evaluate_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str | dict[str, Any]],
    multiplier: float = 1.0,
    *,
    adapter_name: str | None = None,
    batch_size: int = 8,
    model_args: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Runs tasks of lm-eval on a model steered at one strength.

    Args:
        model: A model with a YaPO adapter.
        tokenizer: The model's tokenizer.
        tasks: Names of tasks or groups, such as "mmlu", or configs of tasks of one's own.
        multiplier: The strength; 0 for the model unsteered.
        adapter_name: The adapter to dial; None for the active ones.
        batch_size: Rows per forward pass.
        model_args: For `lm_eval.models.huggingface.HFLM`, such as `{"max_length": 2048}`.
        **options: For `lm_eval.simple_evaluate`, such as `num_fewshot`, `limit`, `apply_chat_template`,
            `log_samples`, `task_manager`.

    Returns:
        What `lm_eval.simple_evaluate` returns.

    Raises:
        ConfigError: There is no task or no such adapter, or the strength is not finite.
        ImportError: lm-eval is not installed.
        UnsupportedOperationError: An adapter steers some tokens only, which lm-eval's calls do not tell apart.
    """
    if not tasks:
        raise ConfigError(f"tasks={tasks!r}: name one task at least, such as 'mmlu'.")
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ImportError("Tasks of lm-eval need it: pip install 'yapo-peft[eval]'.") from error
    training = model.training
    model.eval()
    try:
        with steering(model, multiplier, adapter_name):
            _require_all_positions(model)
            given = {"batch_size": batch_size, **(model_args or {})}
            lm = cast(Any, HFLM)(pretrained=model, tokenizer=tokenizer, **given)
            found = cast(Any, lm_eval).simple_evaluate(model=lm, tasks=list(tasks), **options)
    finally:
        model.train(training)
    return found


def sweep_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str | dict[str, Any]],
    multipliers: Iterable[float] = (0.0, 1.0),
    *,
    metric: str = "acc",
    **options: Any,
) -> Scores:
    """Runs tasks of lm-eval at several strengths.

    Args:
        model: A model with a YaPO adapter.
        tokenizer: The model's tokenizer.
        tasks: As for `evaluate_tasks`.
        multipliers: The strengths.
        metric: A metric that the tasks compute for each document, such as "acc", "acc_norm", "exact_match".
        **options: As for `evaluate_tasks`.

    Returns:
        The metric of each document at each strength, with the label `task`.

    Raises:
        ConfigError: As `evaluate_tasks`; or a task has no such metric.
    """
    strengths = [float(multiplier) for multiplier in multipliers]
    if not strengths or len(set(strengths)) < len(strengths):
        raise ConfigError(f"multipliers={strengths!r}: give one strength at least, and each of them once.")
    rows: list[dict[str, Any]] = []
    for strength in strengths:
        found = evaluate_tasks(model, tokenizer, tasks, strength, **cast(Any, {**options, "log_samples": True}))
        for task, samples in found["samples"].items():
            for sample in samples:
                if metric not in sample:
                    there = ", ".join(repr(name) for name in sample.get("metrics", []))
                    raise ConfigError(f"The task {task!r} has no metric {metric!r} per document, but {there}.")
                rows.append(
                    {"multiplier": strength, "example": sample["doc_id"], metric: float(sample[metric]), "task": task}
                )
    return Scores(pd.DataFrame(rows), (metric,))


def _require_all_positions(model: nn.Module) -> None:
    for layer in steered_layers(model):
        for name in layer.active_adapters:
            if layer.positions.get(name, "all") != "all":
                raise UnsupportedOperationError(
                    f"Adapter {name!r} steers positions={layer.positions[name]!r}: lm-eval scores answers without "
                    "saying where they start, so it would be steered nowhere. Use an adapter of positions='all'."
                )
