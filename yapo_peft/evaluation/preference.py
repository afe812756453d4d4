"""Preference accuracy: how often the chosen answer is the more likely one, and by how much, at a given strength."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError
from ..pairs import pair_batches
from ..tuner import steering
from ..tuner.strength import steered_layers


@dataclass(frozen=True)
class PreferenceScore:
    """Preferences of a model steered with one strength.

    Attributes:
        multiplier: The strength.
        accuracy: Share of pairs whose chosen answer is the more likely one.
        margin: Mean of `log p(chosen) - log p(rejected)`, in nats, summed over each answer's tokens.
        pairs: Number of pairs.
    """

    multiplier: float
    accuracy: float
    margin: float
    pairs: int


def sweep_preferences(
    model: nn.Module,
    dataset: Iterable[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    multipliers: Iterable[float] = (-2.0, -1.0, 0.0, 1.0, 2.0),
    *,
    adapter_name: str | None = None,
    batch_size: int = 8,
) -> list[PreferenceScore]:
    """Scores a model on preference pairs over a range of strengths.

    Args:
        model: A model with a YaPO adapter.
        dataset: Pairs in TRL's preference format, conversational or plain, with a `prompt`.
        tokenizer: The model's tokenizer; its chat template renders conversational pairs, as in training.
        multipliers: Strengths to score.
        adapter_name: The adapter to dial; None for the active ones.
        batch_size: Pairs per forward pass.

    Returns:
        One score per strength, in the order given.

    Raises:
        DatasetError: The dataset is empty, or a pair lacks a column or an answer.
        ConfigError: `multipliers` is empty or holds a value that is not finite, `batch_size` is not positive, or there
            is no such adapter.
    """
    strengths = [float(multiplier) for multiplier in multipliers]
    if not strengths:
        raise ConfigError(f"multipliers={strengths!r}: need one strength at least.")
    batches = pair_batches(dataset, tokenizer, batch_size)
    progress = tqdm(total=len(strengths) * len(batches), desc="Scoring preferences", unit="batch")
    scores = []
    with progress:
        for multiplier in strengths:
            with steering(model, multiplier, adapter_name):
                scores.append(_score(model, batches, multiplier, progress))
    return scores


def score_preferences(
    model: nn.Module,
    dataset: Iterable[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    multiplier: float = 1.0,
    *,
    adapter_name: str | None = None,
    batch_size: int = 8,
) -> PreferenceScore:
    """Scores a model on preference pairs at one strength; see `sweep_preferences`."""
    return sweep_preferences(model, dataset, tokenizer, [multiplier], adapter_name=adapter_name, batch_size=batch_size)[
        0
    ]


@torch.no_grad()
def answer_logps(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, answer_mask: Tensor) -> Tensor:
    """Log-probability of each row's answer, `(batch,)`, in nats, summed over its tokens in float32.

    Args:
        model: A causal language model.
        input_ids: `(batch, seq)`, padded on either side.
        attention_mask: `(batch, seq)`.
        answer_mask: 1 on the tokens of the answer, `(batch, seq)`.
    """
    scored = answer_mask[:, 1:].bool()
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if _needs_labels(model):
        first = 0
        inputs["labels"] = input_ids.masked_fill(answer_mask == 0, -100)
    else:
        # Nothing before the first answer is scored, so the LM head need not run there.
        first = int(scored.any(dim=0).int().argmax())
        inputs["logits_to_keep"] = input_ids.shape[1] - first
    logits = model(**inputs).logits[:, :-1]
    total = torch.zeros(len(input_ids), device=logits.device)
    for row, positions in enumerate(scored):
        targets = input_ids[row, 1:][positions]
        logps = logits[row][positions[first:]].float().log_softmax(-1)
        total[row] = logps.gather(-1, targets[:, None]).sum()
    return total


def _needs_labels(model: nn.Module) -> bool:
    """Whether an adapter must be told which tokens are the answer."""
    return any(layer.positions[name] != "all" for layer in steered_layers(model) for name in layer.steering_adapters)


def _score(model: nn.Module, batches: list[dict[str, Tensor]], multiplier: float, progress: Any) -> PreferenceScore:
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    margins = []
    try:
        for batch in batches:
            logps = answer_logps(model, **{name: value.to(device) for name, value in batch.items()})
            chosen, rejected = logps.chunk(2)
            margins.append((chosen - rejected).cpu())
            progress.update()
    finally:
        model.train(was_training)
    margin = torch.cat(margins)
    return PreferenceScore(multiplier, float((margin > 0).float().mean()), float(margin.mean()), len(margin))
