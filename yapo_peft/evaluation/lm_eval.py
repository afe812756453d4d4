"""Tasks of the Language Model Evaluation Harness, on a steered model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any, cast

import pandas as pd
from torch import nn
from transformers import PreTrainedTokenizerBase

from .._utils import evaluating
from ..errors import ConfigError, UnsupportedOperationError
from ..tuner.adapters import steered_layers
from ..tuner.dial import dialled
from .scores import Scores, distinct


def evaluate_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: str | Sequence[str | dict[str, Any]],
    multiplier: float = 1.0,
    *,
    adapter_name: str | None = None,
    batch_size: int = 8,
    model_args: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Runs tasks of lm-eval on a model steered at one multiplier.

    Args:
        model: A model with a YaPO adapter.
        tokenizer: The model's tokenizer.
        tasks: A task or group, such as "mmlu", or several, or custom task configs.
        multiplier: The multiplier; 0 for the unsteered model.
        adapter_name: The adapter that steers; None for the active ones.
        batch_size: Rows per forward pass.
        model_args: For `lm_eval.models.huggingface.HFLM`, such as `{"max_length": 2048}`.
        **options: For `lm_eval.simple_evaluate`, such as `num_fewshot`, `limit`, `apply_chat_template`,
            `log_samples`, `task_manager`.

    Returns:
        The result of `lm_eval.simple_evaluate`.

    Raises:
        ConfigError: There is no such task or adapter, the multiplier is not finite, or `use_cache` is given.
        ImportError: lm-eval is not installed.
        UnsupportedOperationError: An adapter steers only some tokens, which cannot be identified in lm-eval's calls.
    """
    tasks = [tasks] if isinstance(tasks, str) else list(tasks)
    if options.get("task_manager") is None:
        options["task_manager"] = task_manager()
    unknown = [task for task in tasks if isinstance(task, str) and task not in options["task_manager"].all_tasks]
    if not tasks or unknown:
        raise ConfigError(f"tasks={unknown or tasks!r}: must be tasks or groups of lm-eval, such as 'mmlu'.")
    if options.get("use_cache"):
        raise ConfigError("use_cache= is not supported, because it would mix up the answers of different multipliers.")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with evaluating(model), dialled(model, multiplier, adapter_name):
        _require_all_positions(model)
        given = {"batch_size": batch_size, **(model_args or {})}
        lm = cast(Any, HFLM)(pretrained=model, tokenizer=tokenizer, **given)
        return cast(Any, simple_evaluate)(model=lm, tasks=tasks, **options)


def sweep_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: str | Sequence[str | dict[str, Any]],
    multipliers: Iterable[float] = (0.0, 1.0),
    *,
    metric: str = "acc",
    filter: str | None = None,
    **options: Any,
) -> Scores:
    """Runs tasks of lm-eval at several multipliers.

    Args:
        model: A model with a YaPO adapter.
        tokenizer: The model's tokenizer.
        tasks: As for `evaluate_tasks`.
        multipliers: The multipliers.
        metric: A metric that the tasks compute for each document, such as "acc", "acc_norm", "exact_match".
        filter: The filter whose answers count, such as "strict-match", for tasks with several.
        **options: As for `evaluate_tasks`.

    Returns:
        The metric of each document at each multiplier, with the label `task`.

    Raises:
        ConfigError: As `evaluate_tasks`; or a task has no such metric or filter, which is checked on one document of
            each task first.
    """
    multipliers = distinct(multipliers)
    options = cast(Any, {**options, "log_samples": True})
    if options.get("task_manager") is None:
        options["task_manager"] = task_manager()
    # Checks on one document of each task that it has the metric.
    _rows(evaluate_tasks(model, tokenizer, tasks, multipliers[0], **cast(Any, {**options, "limit": 1})), metric, filter)
    rows: list[dict[str, Any]] = []
    for multiplier in multipliers:
        found = evaluate_tasks(model, tokenizer, tasks, multiplier, **options)
        rows += [{"multiplier": multiplier, **row} for row in _rows(found, metric, filter)]
    return Scores(pd.DataFrame(rows), (metric,))


def task_manager(include_path: str | None = None) -> Any:
    """lm-eval's task manager, with the tasks in a folder added."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError("lm-eval is not installed: pip install 'yapo-peft[eval]'.") from error
    return TaskManager(include_path=include_path)


def _rows(found: dict[str, Any], metric: str, wanted: str | None) -> list[dict[str, Any]]:
    """The metric of each document."""
    rows: list[dict[str, Any]] = []
    for task, samples in found["samples"].items():
        filters = sorted({sample["filter"] for sample in samples})
        if (wanted is None and len(filters) > 1) or (wanted is not None and wanted not in filters):
            there = ", ".join(map(repr, filters))
            raise ConfigError(f"filter={wanted!r}: must be one of {there} for task {task!r}.")
        for sample in samples:
            if wanted is not None and sample["filter"] != wanted:
                continue
            value = sample.get(metric)
            if not isinstance(value, Real):
                numbers = [repr(name) for name in sample.get("metrics", []) if isinstance(sample[name], Real)]
                there = ", ".join(numbers) or "none"
                raise ConfigError(f"Task {task!r} has no per-document number {metric!r}; it has {there}.")
            rows.append({"example": sample["doc_id"], metric: float(value), "task": task})
    return rows


def _require_all_positions(model: nn.Module) -> None:
    for layer in steered_layers(model):
        for name in layer.active_adapters:
            if layer.positions.get(name, "all") != "all":
                raise UnsupportedOperationError(
                    f"Adapter {name!r} steers positions={layer.positions[name]!r}: lm-eval does not mark "
                    "where answers start. Use an adapter with positions='all'."
                )
