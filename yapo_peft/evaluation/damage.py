"""The cost of steering: KL from the unsteered model, perplexity, and repetitive answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .._utils import at_least
from ..errors import DatasetError
from ..scoring.lm_head import text_labels
from ..tuner.dial import dialled


@dataclass(frozen=True)
class Damage:
    """Reads running text, a list of texts or a dataset with a column `text`, split into chunks of equal length.

    Metrics of a chunk, means over its tokens: `kl`, the divergence KL(unsteered || steered) of the next token in nats;
    `nll`, the negative log-likelihood of the text in nats, whose exponential is the perplexity; `top_changed`, the
    share of positions with another most likely next token.

    Attributes:
        block_size: Tokens per chunk, including a BOS token if the tokenizer adds one.
        max_blocks: Maximum number of chunks, from the start; None for all.
    """

    block_size: int = 256
    max_blocks: int | None = None

    def __post_init__(self) -> None:
        at_least(2, block_size=self.block_size)
        if self.max_blocks is not None:
            at_least(1, max_blocks=self.max_blocks)

    def batches(self, dataset: Any, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> list[dict[str, Tensor]]:
        """Batches of `input_ids`, `(blocks, block_size)`."""
        start = [tokenizer.bos_token_id] if _starts_with_bos(tokenizer) else []
        size = self.block_size - len(start)
        tokens: list[int] = []
        for text in _texts(dataset):
            tokens += tokenizer(text + "\n", add_special_tokens=False)["input_ids"]
            if self.max_blocks is not None and len(tokens) >= size * self.max_blocks:
                break
        count = min(len(tokens) // size, self.max_blocks or len(tokens))
        if not count:
            raise DatasetError(f"The text is shorter than block_size={self.block_size} tokens.")
        blocks = torch.tensor([[*start, *tokens[place * size : (place + 1) * size]] for place in range(count)])
        batches = zip(blocks.split(batch_size), torch.arange(count).split(batch_size), strict=True)
        return [{"input_ids": input_ids, "example": example} for input_ids, example in batches]

    def score(self, model: Any, batch: dict[str, Tensor], kept: dict[str, Any]) -> dict[str, Tensor]:
        """Metrics of each chunk, `(chunks,)`."""
        if "base" not in kept:
            with dialled(model.model, 0.0):
                kept["base"] = _next_token_logits(model, batch["input_ids"])
        found: dict[str, list[Tensor]] = {"kl": [], "nll": [], "top_changed": []}
        steered = _next_token_logits(model, batch["input_ids"])
        # One chunk at a time, because the vocabulary makes temporaries large.
        for base, own, ids in zip(kept["base"], steered, batch["input_ids"], strict=True):
            own = own.float().log_softmax(-1)
            base = base.float().log_softmax(-1)
            found["kl"].append(torch.nn.functional.kl_div(own, base, log_target=True, reduction="none").sum(-1).mean())
            found["nll"].append(-own.gather(-1, ids[1:, None]).mean())
            changed = (own.argmax(-1) != base.argmax(-1)).float().mean()
            found["top_changed"].append(changed if own.isfinite().all() else torch.full_like(changed, torch.nan))
        return {name: torch.stack(values) for name, values in found.items()}


@dataclass(frozen=True)
class Repetition:
    """Measures repetition in generated answers to prompts, from a dataset with a column `prompt`.

    Metrics of an answer: `repeated`, the share of its n-grams of words that occurred before; `words`, its length.

    Attributes:
        n: Words per n-gram.
    """

    n: int = 3

    def __post_init__(self) -> None:
        at_least(1, n=self.n)

    def prompts(self, dataset: Any) -> list[Any]:
        """The prompts."""
        return prompts_of(dataset)

    def score_answers(self, dataset: Any, examples: Sequence[int], answers: Sequence[str]) -> list[dict[str, float]]:
        """Metrics of answers."""
        return [{"repeated": repeated_share(text, self.n), "words": float(len(text.split()))} for text in answers]


def repeated_share(text: str, n: int) -> float:
    """The share of a text's n-grams of words that occurred before; 0 for a text of fewer words."""
    words = text.casefold().split()
    runs = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def prompts_of(dataset: Any) -> list[Any]:
    """The column `prompt` of a dataset.

    Raises:
        DatasetError: There is none, or it is empty.
    """
    rows = [dict(row) for row in dataset]
    if not rows or "prompt" not in rows[0]:
        there = sorted(rows[0]) if rows else "nothing"
        raise DatasetError(f"The dataset needs a column 'prompt' with texts or messages; it has {there}.")
    return [row["prompt"] for row in rows]


def _next_token_logits(model: Any, input_ids: Tensor) -> Tensor:
    """Logits of each next token, `(chunks, block_size - 1, vocabulary)`."""
    return model(input_ids=input_ids, use_cache=False, **text_labels(model, input_ids)).logits[:, :-1]


def _texts(dataset: Any) -> Iterable[str]:
    if isinstance(dataset, str):
        raise DatasetError("The dataset is a string: pass a list of texts, or a dataset with a column 'text'.")
    for row in dataset:
        text = row if isinstance(row, str) else dict(row).get("text")
        if not isinstance(text, str):
            raise DatasetError(f"A row is {row!r}: pass texts, or a dataset with a column 'text'.")
        yield text


def _starts_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer starts every text with its BOS token."""
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
