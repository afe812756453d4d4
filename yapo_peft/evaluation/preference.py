"""Preference accuracy: how often the chosen answer is the more likely one, and by how much, at a given strength."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError, DatasetError
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
    if not strengths or batch_size < 1:
        raise ConfigError(
            f"multipliers={strengths!r}, batch_size={batch_size}: need one strength and one pair at least."
        )
    padding = cast(int, tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0)
    batches = _batches([_tokenize(row, tokenizer) for row in dataset], batch_size, padding)
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


def _tokenize(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int], list[int]]:
    """Ids of prompt, chosen and rejected answer; the answers start where they part from the prompt."""
    missing = [name for name in ("prompt", "chosen", "rejected") if not row.get(name)]
    if missing:
        raise DatasetError(f"A pair lacks {missing}: it has {sorted(row)}. Pairs need 'prompt', 'chosen', 'rejected'.")
    prompt = _ids(row["prompt"], tokenizer, is_prompt=True)
    chosen = _ids(row["prompt"] + row["chosen"], tokenizer, is_prompt=False)
    rejected = _ids(row["prompt"] + row["rejected"], tokenizer, is_prompt=False)
    shared = min(_common_prefix(prompt, chosen), _common_prefix(prompt, rejected))
    return prompt[:shared], chosen[shared:], rejected[shared:]


def _ids(text: Any, tokenizer: PreTrainedTokenizerBase, is_prompt: bool) -> list[int]:
    if isinstance(text, str):
        return tokenizer(text if is_prompt else text + str(tokenizer.eos_token or ""))["input_ids"]
    rendered = cast(str, tokenizer.apply_chat_template(text, add_generation_prompt=is_prompt, tokenize=False))
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]


def _common_prefix(first: list[int], second: list[int]) -> int:
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))


def _batches(
    rows: list[tuple[list[int], list[int], list[int]]], batch_size: int, padding: int
) -> list[dict[str, Tensor]]:
    """Pairs of similar length together, padded on the right, chosen rows first."""
    if not rows:
        raise DatasetError("The dataset is empty: there is no preference pair to score.")
    rows = sorted(rows, key=lambda row: len(row[0]) + max(len(row[1]), len(row[2])))
    batches = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        answers = [(prompt, chosen) for prompt, chosen, _ in part] + [
            (prompt, rejected) for prompt, _, rejected in part
        ]
        ids = [torch.tensor(prompt + answer) for prompt, answer in answers]
        mask = [torch.tensor([0] * len(prompt) + [1] * len(answer)) for prompt, answer in answers]
        batches.append(
            {
                "input_ids": pad_sequence(ids, batch_first=True, padding_value=padding),
                "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
                "answer_mask": pad_sequence(mask, batch_first=True),
            }
        )
    return batches
