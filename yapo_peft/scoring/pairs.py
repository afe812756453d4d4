"""Preference pairs as padded batches of tokens, tokenized as TRL does in training."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from .._utils import at_least
from ..errors import DatasetError

Tokens = tuple[list[int], list[int], list[int]]


def pair_batches(
    dataset: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> list[dict[str, Tensor]]:
    """Tokenizes preference pairs and batches those of similar length, longest first, padded on the right.

    Args:
        dataset: Pairs in TRL's preference format, conversational or plain, with a `prompt`.
        tokenizer: The model's tokenizer, whose chat template renders conversational pairs.
        batch_size: Pairs per batch.

    Returns:
        Batches of `input_ids`, `attention_mask` and `answer_mask` (1 on the tokens of the answer), each
        `(2 * pairs, seq)`: first the chosen rows, then the rejected ones; and `example`, `(pairs,)`, the indices of
        the pairs in the dataset.

    Raises:
        ConfigError: `batch_size` is not positive.
        DatasetError: The dataset is empty, or a pair lacks a column or an answer.
    """
    at_least(1, batch_size=batch_size)
    if not isinstance(dataset, Iterable):
        raise DatasetError(f"The dataset is {dataset!r}: must be preference pairs.")
    rows = list(enumerate(_tokenize(row, tokenizer) for row in dataset))
    rows.sort(key=lambda row: -len(row[1][0]) - max(map(len, row[1][1:])))
    if not rows:
        raise DatasetError("The dataset is empty: it has no preference pairs.")
    padding = padding_of(tokenizer)
    return [_batch(rows[start : start + batch_size], padding) for start in range(0, len(rows), batch_size)]


def padding_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token's id, or the EOS token's if the tokenizer has no padding token."""
    return cast(int, tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0)


def _tokenize(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Ids of prompt, chosen and rejected answer; answers start at their first token that differs from the prompt's."""
    if not isinstance(row, Mapping):
        raise DatasetError(
            f"A pair is {row!r}: must be a row with 'prompt', 'chosen' and 'rejected'. Pass a list of rows or a "
            "dataset (for a DataFrame: .to_dict('records'))."
        )
    missing = [name for name in ("prompt", "chosen", "rejected") if not row.get(name)]
    if missing:
        raise DatasetError(
            f"A pair has no {missing}, or it is empty; its columns are {sorted(row)}. Pairs need 'prompt', 'chosen' "
            "and 'rejected'."
        )
    for name in ("chosen", "rejected"):
        require_answer(row[name], name, "A pair")
    options = rendering(row)
    prompt = prompt_ids(row["prompt"], tokenizer, **options)
    chosen = _ids(row["prompt"] + row["chosen"], tokenizer, is_prompt=False, **options)
    rejected = _ids(row["prompt"] + row["rejected"], tokenizer, is_prompt=False, **options)
    shared = min(common_prefix(prompt, chosen), common_prefix(prompt, rejected))
    return prompt[:shared], chosen[shared:], rejected[shared:]


def text_of(message: Mapping[str, Any]) -> str:
    """The text of a message, whose content may be None or a list of parts."""
    content = message.get("content")
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content if isinstance(part, Mapping) and part.get("text"))
    return content or ""


def require_answer(answer: Any, name: str, where: str) -> None:
    """Raises `DatasetError` if an answer, a text or messages, says nothing: it would have no token to learn from."""
    last = answer[-1] if isinstance(answer, list) and answer else answer
    if isinstance(last, Mapping):
        last = last.get("content") or last.get("tool_calls")
    if not last:
        raise DatasetError(f"{where} has {name}={answer!r}, which is empty: leave the pair out.")


def rendering(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the columns of a row say about its rendering by a chat template, as TRL reads them.

    Raises:
        DatasetError: The row has images.
    """
    images = next((name for name in ("images", "image") if row.get(name)), None)
    if images is not None:
        raise DatasetError(
            f"A row has {images!r}, and only text is read here, unlike in training: drop the column to leave them out."
        )
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {"tools": tools or None, **(row.get("chat_template_kwargs") or {})}


def prompt_ids(prompt: Any, tokenizer: PreTrainedTokenizerBase, **options: Any) -> list[int]:
    """Ids of a prompt: a text as it is, or messages rendered by the chat template with a generation prompt.

    Args:
        prompt: The prompt.
        tokenizer: The model's tokenizer.
        **options: For the template, as of `rendering`.
    """
    return _ids(prompt, tokenizer, is_prompt=True, **options)


def _ids(text: Any, tokenizer: PreTrainedTokenizerBase, is_prompt: bool, **options: Any) -> list[int]:
    if isinstance(text, str):
        end = str(tokenizer.eos_token or "")
        return tokenizer(text if is_prompt or text.endswith(end) else text + end)["input_ids"]
    return chat_ids(text, tokenizer, **{"add_generation_prompt": is_prompt, **options})


def chat_ids(messages: Any, tokenizer: PreTrainedTokenizerBase, **options: Any) -> list[int]:
    """Ids of messages, rendered by the chat template.

    Raises:
        DatasetError: The template refuses the messages, such as a system message.
    """
    try:
        rendered = cast(str, tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except TemplateError as error:
        has_system = isinstance(messages, list) and messages and messages[0].get("role") == "system"
        fix = (
            "start the user's first message with the system prompt, as with_system_prompt(..., as_user=True) does"
            if has_system
            else f"its roles are {[message.get('role') for message in messages]}"
        )
        raise DatasetError(f"The tokenizer's chat template refuses a conversation ({error}): {fix}.") from error
    return cast(list[int], tokenizer(rendered, add_special_tokens=False)["input_ids"])


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Ids of the special tokens, including those of chat templates, without one that only stands for unknown ones."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    unknown = cast(int | None, tokenizer.unk_token_id)
    if unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id):  # as in GPT-2, which has one for all
        unknown = None
    return torch.tensor(sorted({*added, *tokenizer.all_special_ids} - {unknown}), dtype=torch.long)


def common_prefix(first: list[int], second: list[int]) -> int:
    """Length of the common prefix of two lists of tokens."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))


def _batch(rows: list[tuple[int, Tokens]], padding: int) -> dict[str, Tensor]:
    pairs = [tokens for _, tokens in rows]
    answers = [(prompt, chosen) for prompt, chosen, _ in pairs] + [(prompt, rejected) for prompt, _, rejected in pairs]
    batch = padded_answers(answers, padding)
    return {**batch, "example": torch.tensor([index for index, _ in rows])}


def padded_answers(answers: list[tuple[list[int], list[int]]], padding: int) -> dict[str, Tensor]:
    """Prompts followed by answers, padded on the right, with masks of all tokens and of the answers."""
    ids = [torch.tensor(prompt + answer) for prompt, answer in answers]
    mask = [torch.tensor([0] * len(prompt) + [1] * len(answer)) for prompt, answer in answers]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=padding),
        "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
        "answer_mask": pad_sequence(mask, batch_first=True),
    }
