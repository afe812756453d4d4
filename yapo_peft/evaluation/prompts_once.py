"""Runs the prompt of a pair once for both of its answers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..scoring.agreement import TOKENS_AT_ONCE, why_not_shared, window_of
from ..scoring.packing import PackedBatch, attention_cost, head_on, keep_rows, share_prompts
from ..tuner import steering
from ..tuner.blocks import decoder_blocks


class PromptsOnce:
    """Lays pairs out so that no prompt is run twice, in models that give the same then.

    The longest pairs are compared, because attention can look back only so far and say so in a way of its own.

    Args:
        model: A model with a YaPO adapter.
        base: The causal language model in it.
    """

    def __init__(self, model: nn.Module, base: nn.Module) -> None:
        self._model, self._base = model, base
        self._is_shared, self._compared = True, 0
        self._cost = attention_cost(base, decoder_blocks(base)[1][-1])

    def packed(self, batch: dict[str, Tensor]) -> PackedBatch | None:
        """A batch of pairs, packed; None where rows must stay as they are.

        Args:
            batch: As `pair_batches` makes them.
        """
        pairs = {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "completion_mask": batch["answer_mask"],
        }
        longest = int(batch["attention_mask"].sum(dim=1).max())
        if longest > window_of(self._base):
            return None
        if self._is_shared and longest > self._compared:
            self._is_shared, self._compared = self._can_be_shared(pairs, longest), longest
        if not self._is_shared:
            return None
        return share_prompts(pairs, self._cost)

    def _can_be_shared(self, pairs: dict[str, Tensor], longest: int) -> bool:
        lengths = torch.stack(pairs["attention_mask"].sum(dim=1).chunk(2)).amax(dim=0)
        two = lengths.argsort(descending=True)[:2]
        sample = {name: torch.cat([part[two] for part in rows.chunk(2)]) for name, rows in pairs.items()}

        def score(rows: PackedBatch) -> Tensor:
            return packed_log_probs(self._model, self._base, rows)

        is_exact = next(self._base.parameters()).dtype == torch.float32
        with torch.no_grad(), steering(self._model, 0.0):
            return why_not_shared(self._base, score, sample, score(keep_rows(sample)), longest, is_exact) is None


def packed_log_probs(model: Any, base: Any, batch: PackedBatch) -> Tensor:
    """Log-probabilities of the answers' tokens, `(2 * pairs, seq - 1)`, in nats, in float32; 0 elsewhere.

    Args:
        model: What is called.
        base: The causal language model in it.
        batch: The pairs.
    """
    inputs = {name: value for name, value in batch.inputs(base.dtype).items() if name != "labels"}
    with head_on(base, batch.predictors):
        logits = model(**inputs, use_cache=False).logits[0]
    found = [
        part.float().log_softmax(-1).gather(-1, targets[:, None].to(part.device)).squeeze(-1)
        for part, targets in zip(logits.split(TOKENS_AT_ONCE), batch.targets.split(TOKENS_AT_ONCE), strict=True)
    ]
    scored = batch.scored.to(logits.device)
    return torch.zeros(scored.shape, device=logits.device).masked_scatter(scored, torch.cat(found))
