"""Whether the chosen answer is more likely than the rejected one, and by how much."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..scoring.pairs import pair_batches
from ..scoring.scorer import SweepScorer


@dataclass(frozen=True)
class Preference:
    """Reads preference pairs in TRL's format, conversational or plain, with a `prompt`.

    Metrics of a pair: `accuracy`, 1 if the chosen answer is the more likely one; `margin`, `log p(chosen) -
    log p(rejected)` in nats, summed over each answer's tokens; `margin_per_token`, the same with means over tokens.
    """

    def batches(
        self, dataset: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, batch_size: int
    ) -> list[dict[str, Tensor]]:
        """Batches of pairs with `batch_size` rows, two per pair."""
        return pair_batches(dataset, tokenizer, max(1, batch_size // 2))

    def score(self, model: SweepScorer, batch: dict[str, Tensor], kept: dict[str, Any]) -> dict[str, Tensor]:
        """Metrics of each pair, `(pairs,)`."""
        logps = model.pair_logps(batch, kept)
        tokens = batch["answer_mask"].sum(dim=1)
        margin, per_token = (chosen - rejected for chosen, rejected in (logps.chunk(2), (logps / tokens).chunk(2)))
        return {"accuracy": share_above_zero(margin), "margin": margin, "margin_per_token": per_token}


def share_above_zero(margin: Tensor) -> Tensor:
    """1 where a margin is positive, 0 where it is not, and NaN where the model overflowed."""
    return (margin > 0).float().masked_fill(~margin.isfinite(), torch.nan)
