"""Tokenises texts in batches, and runs the model on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from .._utils import at_least, device_of
from ..data.sources import as_message
from ..errors import ConfigError, DatasetError
from ..scoring.checks import context_length
from ..scoring.pairs import chat_ids, common_prefix, padding_of, prompt_ids, rendering
from ..tuner.blocks import base_of

_SHAPES = "pass texts, or rows with a column 'text', 'messages', or 'prompt' with 'chosen' or 'completion'"


def tokens_of(text: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenises one text.

    Args:
        text: A text; messages; or a row with a column `text`, `messages`, or `prompt` and an answer, which is `chosen`
            or `completion`. Conversations are rendered by the tokenizer's chat template.
        tokenizer: The model's tokenizer.

    Raises:
        DatasetError: `text` is none of these.
    """
    options: dict[str, Any] = {}
    if isinstance(text, dict):
        options = rendering(cast(dict[str, Any], text))
        text = content_of_row(cast(dict[str, Any], text))
    if isinstance(text, str):
        return cast(list[int], tokenizer(text)["input_ids"])
    if isinstance(text, list) and text and isinstance(text[0], dict):
        return chat_ids(text, tokenizer, **options)
    raise DatasetError(f"{text!r} is not a text: {_SHAPES}.")


def answer_start(text: Any, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The index of the answer's first token, for a row with a prompt and an answer; None for other texts."""
    if not isinstance(text, dict) or not text.get("prompt") or any(text.get(name) for name in ("text", "messages")):
        return None
    return common_prefix(prompt_ids(text["prompt"], tokenizer, **rendering(text)), ids)


def content_of_row(row: dict[str, Any]) -> Any:
    """The text or messages of a row. Raises `DatasetError` if it has neither."""
    found = next((row[name] for name in ("text", "messages") if row.get(name)), None)
    if found is None and row.get("prompt"):
        found, answer = row["prompt"], row.get("chosen") or row.get("completion")
        if answer and isinstance(found, str) != isinstance(answer, str):
            found = as_message("prompt", found) if isinstance(found, str) else found
            answer = as_message("chosen", answer) if isinstance(answer, str) else answer
        found = found + answer if answer else found
    if found is None:
        raise DatasetError(f"A row has no text in its columns {sorted(row)}: {_SHAPES}.")
    return found


def require_texts(texts: Any) -> None:
    """Raises `DatasetError` for a single text or row, and for a DataFrame, which iterates over its columns' names."""
    if isinstance(texts, str | Mapping | pd.DataFrame) or not isinstance(texts, Iterable):
        rows = ", such as .to_dict('records')" if isinstance(texts, pd.DataFrame) else ""
        raise DatasetError(f"texts is a {type(texts).__name__}, not a list or a dataset: {_SHAPES}{rows}.")


def text_batches(
    texts: Iterable[Any], tokenizer: PreTrainedTokenizerBase, batch_size: int, max_length: int, model: nn.Module
) -> Iterator[list[list[int]]]:
    """Tokenises texts lazily, in batches of `batch_size`.

    Texts are truncated to `max_length` tokens and to the model's context.

    Raises:
        ConfigError: A size is not positive.
        DatasetError: `texts` is not a collection of texts, or one of them is not a text.
    """
    at_least(1, batch_size=batch_size, max_length=max_length)
    require_texts(texts)
    max_length = min(max_length, context_length(base_of(model)) or max_length)
    tokens = (tokens_of(text, tokenizer)[:max_length] for text in texts)
    return iter(lambda: list(islice(tokens, batch_size)), [])


def padded(batch: list[list[int]], tokenizer: PreTrainedTokenizerBase, device: torch.device) -> dict[str, Tensor]:
    """Returns `input_ids` and `attention_mask` of a batch, `(batch, seq)`, padded on the right."""
    rows = [torch.tensor(tokens, dtype=torch.long, device=device) for tokens in batch]
    ids = pad_sequence(rows, batch_first=True, padding_value=padding_of(tokenizer))
    return {"input_ids": ids, "attention_mask": pad_sequence(list(map(torch.ones_like, rows)), batch_first=True)}


def device_and_dtype(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Returns the device and the dtype of a model's weights."""
    base = base_of(model)
    return device_of(base), base.dtype


def tokenizer_of(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    """Returns the tokenizer; loaded by the model's name if None. Raises `ConfigError` if there is none."""
    if tokenizer is not None:
        return tokenizer
    from transformers import AutoTokenizer

    base = base_of(model)
    name = getattr(base, "name_or_path", "")
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"No tokenizer found for the model {name!r}: pass tokenizer=.") from error
