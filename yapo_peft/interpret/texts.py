"""Texts as batches of tokens, and what steered blocks put out for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError, DatasetError
from ..pairs import padding_of
from ..tuner import YaPOLayer, steering
from ..tuner.observe import block_outputs

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
        row = cast(dict[str, Any], text)
        found = next((row[name] for name in ("text", "messages") if row.get(name)), None)
        if found is None and row.get("prompt"):
            found = row["prompt"] + (row.get("chosen") or row.get("completion") or type(row["prompt"])())
        text = found
    if isinstance(text, str):
        return cast(list[int], tokenizer(text)["input_ids"])
    if isinstance(text, list) and text and isinstance(text[0], dict):
        rendered = cast(str, tokenizer.apply_chat_template(cast(Any, text), tokenize=False))
        return cast(list[int], tokenizer(rendered, add_special_tokens=False)["input_ids"])
    raise DatasetError(f"A text is {text!r}: {_SHAPES}.")


def text_batches(
    texts: Iterable[Any], tokenizer: PreTrainedTokenizerBase, batch_size: int, max_length: int
) -> Iterator[list[list[int]]]:
    """Batches of tokens, `batch_size` texts each, as they come; what exceeds `max_length` tokens is left out.

    Raises:
        ConfigError: A size is not positive.
        DatasetError: `texts` is one string, or one of them is no text.
    """
    if batch_size < 1 or max_length < 1:
        raise ConfigError(f"batch_size={batch_size}, max_length={max_length}: give one text and one token at least.")
    if isinstance(texts, str):
        raise DatasetError(f"The texts are one string: {_SHAPES}.")
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

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        raise _Enough

    can_stop = not any(hasattr(module, "_hf_hook") for module in base.modules())
    with steering(model, 0.0), block_outputs(layers) as outputs:
        handle = layers[-1].block.register_forward_hook(stop) if can_stop else None
        try:
            base.base_model(**inputs, use_cache=False)
        except _Enough:
            pass
        finally:
            if handle is not None:
                handle.remove()
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
