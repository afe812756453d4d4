"""One measure over many strengths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError, DatasetError
from ..generation import answer, mixed_seed
from ..modes import evaluating
from ..pairs import prompt_ids
from ..tuner import steering
from ..tuner.strength import require_enabled
from .lower_half import LowerHalfOnce
from .preference import Preference
from .scores import Scores, distinct


class LikelihoodMeasure(Protocol):
    """What reads log-probabilities."""

    def batches(self, dataset: Any, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> list[dict[str, Tensor]]:
        """Batches of tensors; `example`, `(examples,)`, says which examples of the dataset are in it."""
        ...

    def score(self, model: Any, batch: dict[str, Tensor], kept: dict[str, Any]) -> dict[str, Tensor]:
        """Metrics of a batch's examples, `(examples,)` each, of the model as it is steered now.

        `kept` holds what the measure puts into it for the same batch at other strengths.
        """
        ...


class AnswerMeasure(Protocol):
    """What reads generated answers."""

    def prompts(self, dataset: Any) -> list[Any]:
        """A prompt per example, as a text or messages."""
        ...

    def score_answers(self, dataset: Any, examples: Sequence[int], answers: Sequence[str]) -> list[dict[str, float]]:
        """Metrics of answers to the prompts of examples."""
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
    """Measures a model over a range of strengths.

    Log-probabilities: what lies below the lowest steered block is run once per batch, whatever the number of strengths,
    and the prompt of a pair once for both answers, where that gives the same. Answers: the strengths of a prompt are
    generated in one batch, if it has room for them, and are kept in the table.

    Args:
        model: A model with a YaPO adapter.
        dataset: What the measure reads, such as preference pairs.
        tokenizer: The model's tokenizer; its chat template renders conversations, as in training.
        multipliers: The strengths.
        measure: What to measure: `Preference()` if None, or `MultipleChoice`, `Damage`, `GeneratedChoice`,
            `Repetition`, `Judge`.
        adapter_name: The adapter to dial; None for the active ones.
        batch_size: Rows per forward pass.
        seed: Of the sampling, for measures of answers.
        **generation: For `model.generate`, such as `max_new_tokens=64`; greedy unless `do_sample=True`.

    Returns:
        The metrics of each example at each strength.

    Raises:
        DatasetError: The dataset is empty, or lacks what the measure reads.
        ConfigError: An argument has a value that cannot work, there is no such adapter, or adapters are disabled.
    """
    strengths = distinct(multipliers)
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: need one row at least.")
    for strength in strengths:
        with steering(model, strength, adapter_name):
            pass  # so that a strength or an adapter that cannot work is an error before any work
    if any(strengths):
        require_enabled(model)
    measure = Preference() if measure is None else measure
    if isinstance(measure, type):
        raise ConfigError(f"measure={measure.__name__} is a class: give one of it, measure={measure.__name__}(...).")
    if not hasattr(dataset, "__getitem__"):
        dataset = list(dataset)
    with evaluating(model):
        if hasattr(measure, "score_answers"):
            rows = _sweep_answers(
                model, dataset, tokenizer, strengths, measure, adapter_name, batch_size, seed, generation
            )
        elif generation:
            raise ConfigError(f"{next(iter(generation))}= is for measures of answers; this one generates nothing.")
        else:
            rows = _sweep_likelihoods(model, dataset, tokenizer, strengths, measure, adapter_name, batch_size)
    rows.sort(key=lambda row: (strengths.index(row["multiplier"]), row["example"]))
    table = pd.DataFrame(rows)
    return Scores(table, tuple(name for name in table.columns if name not in ("multiplier", "example", "answer")))


@torch.no_grad()
def _sweep_likelihoods(
    model: nn.Module,
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    strengths: list[float],
    measure: Any,
    adapter_name: str | None,
    batch_size: int,
) -> list[dict[str, float]]:
    batches = measure.batches(dataset, tokenizer, batch_size)
    device = next(p.device for p in model.parameters() if not p.is_meta)
    with steering(model, 1.0, adapter_name):
        lower = LowerHalfOnce(model, len(strengths))
    rows: list[dict[str, float]] = []
    with tqdm(total=len(strengths) * len(batches), desc="Measuring", unit="batch") as progress:
        for batch in batches:
            batch = {name: value.to(device) for name, value in batch.items()}
            kept: dict[str, Any] = {}
            for strength in strengths:
                with steering(model, strength, adapter_name):
                    found = measure.score(lower, batch, kept)
                columns = {name: values.float().tolist() for name, values in found.items()}
                for index, example in enumerate(batch["example"].tolist()):
                    metrics = {name: values[index] for name, values in columns.items()}
                    rows.append({"multiplier": strength, "example": example, **metrics})
                progress.update()
    return rows


def _sweep_answers(
    model: nn.Module,
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    strengths: list[float],
    measure: Any,
    adapter_name: str | None,
    batch_size: int,
    seed: int,
    generation: dict[str, Any],
) -> list[dict[str, Any]]:
    prompts = [prompt_ids(prompt, tokenizer) for prompt in measure.prompts(dataset)]
    if not prompts:
        raise DatasetError("The dataset is empty: there is nothing to answer.")
    taken = [name for name in ("max_length", "num_return_sequences", "num_beams") if name in generation]
    if taken:
        raise ConfigError(
            f"{taken[0]}={generation[taken[0]]!r}: each prompt gets one answer of max_new_tokens; leave it out."
        )
    # Whole prompts, where all strengths of one fit.
    size = batch_size // len(strengths) * len(strengths) or batch_size
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    work = [(index, strength) for index in order for strength in strengths]
    options = {"max_new_tokens": 64, "do_sample": False, **generation}
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(work), desc="Answering", unit="answer") as progress:
        for start in range(0, len(work), size):
            part = work[start : start + size]
            of_rows = torch.tensor([strength for _, strength in part])
            with steering(model, of_rows, adapter_name):
                given = [prompts[index] for index, _ in part]
                answers = answer(model, tokenizer, given, seed=mixed_seed(seed, start), **options)
            examples = [index for index, _ in part]
            found = measure.score_answers(dataset, examples, [text for text, _ in answers])
            rows += [
                {"multiplier": strength, "example": index, "answer": text, **metrics}
                for (index, strength), (text, _), metrics in zip(part, answers, found, strict=True)
            ]
            progress.update(len(part))
    return rows
