"""Texts as batches of tokens, and what steered blocks put out for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError, DatasetError
from ..scoring.pairs import common_prefix, padding_of, prompt_ids
from ..tuner import YaPOLayer, steering
from ..tuner.hooks import block_outputs, forward_hooks
from .checks import require_counts

_SHAPES = "give texts, or rows with a column 'text', 'messages', or 'prompt' with 'chosen' or 'completion'"


class _Enough(Exception):  # noqa: N818
    """Ends a forward pass of which nothing more is read."""


def tokens_of(text: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of one text, as the model reads it.

    Args:
        text: A text; messages; or a row with a column `text`, `messages`, or `prompt` and an answer, which is `chosen`
            or `completion`. Conversations are rendered by the tokenizer's chat template.
        tokenizer: The model's.

    Raises:
        DatasetError: It is something else.
    """
    if isinstance(text, dict):
        text = content_of_row(cast(dict[str, Any], text))
    if isinstance(text, str):
        return cast(list[int], tokenizer(text)["input_ids"])
    if isinstance(text, list) and text and isinstance(text[0], dict):
        rendered = cast(str, tokenizer.apply_chat_template(cast(Any, text), tokenize=False))
        return cast(list[int], tokenizer(rendered, add_special_tokens=False)["input_ids"])
    raise DatasetError(f"A text is {text!r}: {_SHAPES}.")


def answer_start(text: Any, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Where the answer of a row with a prompt and an answer starts in its tokens; None of other texts."""
    if not isinstance(text, dict) or not text.get("prompt") or any(text.get(name) for name in ("text", "messages")):
        return None
    return common_prefix(prompt_ids(text["prompt"], tokenizer), ids)


def content_of_row(row: dict[str, Any]) -> Any:
    """The text or messages of a row.

    Raises:
        DatasetError: It has no column of either.
    """
    found = next((row[name] for name in ("text", "messages") if row.get(name)), None)
    if found is None and row.get("prompt"):
        found = row["prompt"] + (row.get("chosen") or row.get("completion") or type(row["prompt"])())
    if found is None:
        raise DatasetError(f"A row has the columns {sorted(row)}, and no text in them: {_SHAPES}.")
    return found


def require_texts(texts: Any) -> None:
    """Raises unless something is a collection of texts.

    Raises:
        DatasetError: It is one text, one row, or a table that gives its columns' names.
    """
    if isinstance(texts, str | Mapping | pd.DataFrame) or not isinstance(texts, Iterable):
        rows = " (of a DataFrame: .to_dict('records'))" if isinstance(texts, pd.DataFrame) else ""
        raise DatasetError(f"The texts are one {type(texts).__name__}: {_SHAPES}, in a list or a dataset{rows}.")


def window_of(model: nn.Module) -> int | None:
    """How many tokens a model takes, if its config says so."""
    return getattr(base_of(model).config.get_text_config(), "max_position_embeddings", None)


def text_batches(
    texts: Iterable[Any], tokenizer: PreTrainedTokenizerBase, batch_size: int, max_length: int, model: nn.Module
) -> Iterator[list[list[int]]]:
    """Batches of tokens, `batch_size` texts each, as they come.

    What exceeds `max_length` tokens of a text, or what the model takes, is left out.

    Raises:
        ConfigError: A size is not positive.
        DatasetError: They are no texts, or one of them is none.
    """
    require_counts(batch_size=batch_size, max_length=max_length)
    require_texts(texts)
    max_length = min(max_length, window_of(model) or max_length)
    return _batches(texts, tokenizer, batch_size, max_length)


def _batches(
    texts: Iterable[Any], tokenizer: PreTrainedTokenizerBase, batch_size: int, max_length: int
) -> Iterator[list[list[int]]]:
    batch: list[list[int]] = []
    for text in texts:
        batch.append(tokens_of(text, tokenizer)[:max_length])
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def padded(batch: list[list[int]], tokenizer: PreTrainedTokenizerBase, device: torch.device) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` of a batch, `(batch, seq)`, padded on the right."""
    length = max(1, *map(len, batch))
    ids = torch.full((len(batch), length), padding_of(tokenizer))
    mask = torch.zeros(len(batch), length, dtype=torch.long)
    for row, tokens in enumerate(batch):
        ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        mask[row, : len(tokens)] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


@torch.no_grad()
def unsteered_outputs(model: nn.Module, layers: list[YaPOLayer], inputs: dict[str, Tensor]) -> dict[int, Tensor]:
    """What steered blocks put out with steering off, `(batch, seq, d_model)` by the block's index.

    The blocks above the highest one are not run, but where accelerate moves weights for each block.
    """
    base = base_of(model)

    def stop(output: Any) -> None:
        raise _Enough

    can_stop = not any(hasattr(module, "_hf_hook") for module in base.modules())
    stopping = forward_hooks([(layers[-1].block, stop)] if can_stop else [])
    with steering(model, 0.0), block_outputs(layers) as outputs, stopping, suppress(_Enough):
        base.base_model(**inputs, use_cache=False)
    return outputs


def base_of(model: nn.Module) -> Any:
    """The causal language model within PEFT's wrapper."""
    return cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model


def device_and_dtype(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a model's weights are, and what it computes in."""
    base = base_of(model)
    return next((p.device for p in base.parameters() if not p.is_meta), torch.device("cpu")), base.dtype


def tokenizer_of(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    """The tokenizer, or that of the model's name.

    Raises:
        ConfigError: There is none by that name.
    """
    if tokenizer is not None:
        return tokenizer
    from transformers import AutoTokenizer

    base = base_of(model)
    name = getattr(base, "name_or_path", "")
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"There is no tokenizer under the model's name, {name!r}: give tokenizer=.") from error
