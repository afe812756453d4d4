"""Measures a model over a range of multipliers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .._utils import at_least, device_of, evaluating, mixed_seed
from ..errors import ConfigError, DatasetError
from ..scoring.checks import longest, require_length
from ..scoring.generation import answer
from ..scoring.pairs import prompt_ids, rendering
from ..scoring.scorer import SweepScorer
from ..tuner.adapters import require_enabled
from ..tuner.blocks import base_of
from ..tuner.dial import dialled
from .preference import Preference
from .scores import Scores, distinct


class LikelihoodMeasure(Protocol):
    """A measure that reads log-probabilities."""

    def batches(self, dataset: Any, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> list[dict[str, Tensor]]:
        """Batches of tensors; `example`, `(examples,)`, has the indices of the dataset's examples in it."""
        ...

    def score(self, model: Any, batch: dict[str, Tensor], kept: dict[str, Any]) -> dict[str, Tensor]:
        """Metrics of a batch's examples, `(examples,)` each, at the current multiplier.

        The measure may keep values in `kept` for the same batch at other multipliers.
        """
        ...


class AnswerMeasure(Protocol):
    """A measure that reads generated answers."""

    def prompts(self, dataset: Any) -> list[Any]:
        """One prompt per example, a text or messages."""
        ...

    def score_answers(self, dataset: Any, examples: Sequence[int], answers: Sequence[str]) -> list[dict[str, float]]:
        """Metrics of each answer."""
        ...


def sweep(
    model: nn.Module,
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    multipliers: Iterable[float] = (-2.0, -1.0, 0.0, 1.0, 2.0),
    *,
    measure: LikelihoodMeasure | AnswerMeasure | None = None,
    adapter_name: str | None = None,
    batch_size: int = 8,
    seed: int = 0,
    **generation: Any,
) -> Scores:
    """Measures a model over a range of multipliers.

    For log-probabilities, everything below the output of the lowest steered layer runs once per batch, whatever the
    number of multipliers, and the prompt of a pair once for both answers, if that gives the same. For generated
    answers, all multipliers of a prompt are in one batch, if they fit, and the answers are kept in the table.

    Args:
        model: A model with a YaPO adapter; or, for measures of log-probabilities, with a LoRA, which multipliers scale,
            or with an adapter of another method, at multipliers 0 and 1.
        dataset: What the measure reads, such as preference pairs.
        tokenizer: The model's tokenizer; its chat template renders conversations, as in training.
        multipliers: The multipliers.
        measure: What to measure: `Preference()` if None, or `MultipleChoice`, `Damage`, `GeneratedChoice`,
            `Repetition`, `Judge`.
        adapter_name: The adapter to dial; None for the active ones.
        batch_size: Rows per forward pass.
        seed: Of the sampling, for measures of answers.
        **generation: For `model.generate`, such as `max_new_tokens=64`; greedy unless `do_sample=True`.

    Returns:
        The metrics of each example at each multiplier.

    Raises:
        DatasetError: The dataset is empty, or lacks what the measure reads.
        ConfigError: An argument has a value that cannot work, there is no such adapter, or adapters are disabled.
    """
    multipliers = distinct(multipliers)
    at_least(1, batch_size=batch_size)
    for multiplier in multipliers:
        with dialled(model, multiplier, adapter_name):
            pass  # raises before any work if the multiplier or the adapter is invalid
    if any(multipliers):
        require_enabled(model)
    measure = Preference() if measure is None else measure
    if isinstance(measure, type):
        raise ConfigError(f"measure={measure.__name__} is a class: pass an instance, {measure.__name__}(...).")
    if not hasattr(dataset, "__getitem__"):
        dataset = list(dataset)
    with evaluating(model):
        if hasattr(measure, "score_answers"):
            rows = _sweep_answers(
                model, dataset, tokenizer, multipliers, measure, adapter_name, batch_size, seed, generation
            )
        elif generation:
            raise ConfigError(f"{next(iter(generation))}= is only supported by measures of generated answers.")
        else:
            rows = _sweep_likelihoods(model, dataset, tokenizer, multipliers, measure, adapter_name, batch_size)
    rows.sort(key=lambda row: (multipliers.index(row["multiplier"]), row["example"]))
    table = pd.DataFrame(rows)
    return Scores(table, tuple(name for name in table.columns if name not in ("multiplier", "example", "answer")))


@torch.no_grad()
def _sweep_likelihoods(
    model: nn.Module,
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    multipliers: list[float],
    measure: Any,
    adapter_name: str | None,
    batch_size: int,
) -> list[dict[str, float]]:
    batches = measure.batches(dataset, tokenizer, batch_size)
    device = device_of(model)
    with dialled(model, 1.0, adapter_name):
        scorer = SweepScorer(model, len(multipliers))
    require_length(scorer.base, longest(batches), "A row")
    rows: list[dict[str, float]] = []
    with tqdm(total=len(multipliers) * len(batches), desc="Measuring", unit="batch") as progress:
        for batch in batches:
            batch = {name: value.to(device) for name, value in batch.items()}
            kept: dict[str, Any] = {}
            for multiplier in multipliers:
                with dialled(model, multiplier, adapter_name):
                    found = measure.score(scorer, batch, kept)
                columns = {name: values.float().tolist() for name, values in found.items()}
                for index, example in enumerate(batch["example"].tolist()):
                    metrics = {name: values[index] for name, values in columns.items()}
                    rows.append({"multiplier": multiplier, "example": example, **metrics})
                progress.update()
    return rows


def _sweep_answers(
    model: nn.Module,
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    multipliers: list[float],
    measure: Any,
    adapter_name: str | None,
    batch_size: int,
    seed: int,
    generation: dict[str, Any],
) -> list[dict[str, Any]]:
    asked = zip(measure.prompts(dataset), dataset, strict=True)
    prompts = [prompt_ids(prompt, tokenizer, **rendering(dict(row))) for prompt, row in asked]
    if not prompts:
        raise DatasetError("The dataset is empty: it has no prompts.")
    taken = [name for name in ("max_length", "num_return_sequences", "num_beams") if name in generation]
    if taken:
        raise ConfigError(
            f"{taken[0]}={generation[taken[0]]!r}: not supported, each prompt gets one answer of up to max_new_tokens."
        )
    options = {"max_new_tokens": 64, "do_sample": False, **generation}
    require_length(base_of(model), max(map(len, prompts)) + options["max_new_tokens"], "A prompt with its answer")
    # All multipliers of a prompt in one batch, if they fit.
    size = batch_size // len(multipliers) * len(multipliers) or batch_size
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    work = [(index, multiplier) for index in order for multiplier in multipliers]
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(work), desc="Answering", unit="answer") as progress:
        for start in range(0, len(work), size):
            part = work[start : start + size]
            of_rows = torch.tensor([multiplier for _, multiplier in part])
            with dialled(model, of_rows, adapter_name):
                given = [prompts[index] for index, _ in part]
                answers = answer(model, tokenizer, given, seed=mixed_seed(seed, start), **options)
            examples = [index for index, _ in part]
            found = measure.score_answers(dataset, examples, [text for text, _ in answers])
            rows += [
                {"multiplier": multiplier, "example": index, "answer": text, **metrics}
                for (index, multiplier), (text, _), metrics in zip(part, answers, found, strict=True)
            ]
            progress.update(len(part))
    return rows
