"""Sequences of tokens to train and to evaluate on, and which of their tokens count."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .._utils import mixed_seed
from ..errors import DatasetError
from ..interpret.texts import content_of_row, require_texts, tokens_of

# Shorter sequences are not worth running, because the first token is left out.
_SHORTEST = 4


def windows(text: Any, tokenizer: PreTrainedTokenizerBase, context: int) -> list[Tensor]:
    """The tokens of a text, `(seq,)` in int32, split into sequences of at most `context` tokens.

    If the tokenizer begins texts with a BOS token, each sequence begins with one.
    """
    ids = torch.tensor(tokens_of(text, tokenizer), dtype=torch.int32)
    start = ids[:1] if len(ids) and int(ids[0]) == tokenizer.bos_token_id else ids[:0]
    parts = (torch.cat([start, part]) for part in ids[len(start) :].split(context - len(start)))
    return [window for window in parts if len(window) >= _SHORTEST]


def held_out_rows(
    texts: Iterable[Any], tokenizer: PreTrainedTokenizerBase, context: int, share: float, most: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Sequences to train on, and a share of the text that is held out.

    Of texts that are long enough, the end is held out; and of the others, whole texts, drawn by their content, so that
    the answers to a prompt are on the same side.

    Args:
        texts: Texts, conversations or rows; see `tokens_of`.
        tokenizer: The model's tokenizer.
        context: Tokens per sequence.
        share: Share to hold out.
        most: Number of tokens to train on, at which reading ends.

    Raises:
        DatasetError: A text is none, or there is nothing to train on or to hold out.
    """
    train: list[Tensor] = []
    held_out: list[Tensor] = []
    every, read = max(2, round(1 / share)), 0
    for text, rows in _read(texts, tokenizer, context):
        cut = len(rows)
        if len(rows) >= every:
            cut -= round(len(rows) * share)
        elif mixed_seed("held out", _prompt(text)) % every == 0:
            cut = 0
        train += rows[:cut]
        held_out += rows[cut:]
        read += sum(map(len, rows[:cut]))
        if read >= most:
            break
    train, held_out = _thinned(train, most), _thinned(held_out, max(context, round(most * share)))
    if not train or not held_out:
        raise DatasetError(
            f"The text has {len(train)} sequences to train on and {len(held_out)} to hold out: pass more text, or "
            f"held-out text of its own. About one text in {every} is held out, or the end of long ones."
        )
    return train, held_out


def rows_of(
    texts: Iterable[Any], tokenizer: PreTrainedTokenizerBase, context: int, most: float = float("inf")
) -> list[Tensor]:
    """Sequences of at least `most` tokens in all, if there are as many. Raises `DatasetError` if there are none."""
    found: list[Tensor] = []
    read = 0
    for _, rows in _read(texts, tokenizer, context):
        found += rows
        read += sum(map(len, rows))
        if read >= most:
            break
    if not found:
        raise DatasetError(f"The text has no sequence of at least {_SHORTEST} tokens: pass more or longer texts.")
    return _thinned(found, most)


def _thinned(rows: list[Tensor], most: float) -> list[Tensor]:
    """About as many tokens as asked for, at most twice that, in sequences at equal distances."""
    return rows[:: max(1, int(sum(map(len, rows)) / most))]


def _prompt(text: Any) -> Any:
    """What texts that belong together have in common: the prompt, or all messages but the last."""
    if isinstance(text, dict):
        text = text.get("prompt") or content_of_row(text)
    return text[:-1] or text if isinstance(text, list) else text


def _read(texts: Iterable[Any], tokenizer: PreTrainedTokenizerBase, context: int) -> Iterator[tuple[Any, list[Tensor]]]:
    require_texts(texts)
    with tqdm(desc="Reading text", unit="token", unit_scale=True) as progress:
        for text in texts:
            rows = windows(text, tokenizer, context)
            progress.update(sum(map(len, rows)))
            yield text, rows


def usable(row: Tensor, special: Tensor) -> Tensor:
    """Which tokens of a sequence count, `(seq,)`: all but the first, which is an attention sink, and special ones."""
    counts = ~torch.isin(row, special)
    counts[0] = False
    return counts


def by_length(rows: list[Tensor], indices: Iterable[int], size: int) -> Iterator[list[int]]:
    """Batches of sequences of similar lengths."""
    ordered = sorted(indices, key=lambda index: len(rows[index]))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]
