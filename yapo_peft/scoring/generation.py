"""Generates answers to a batch of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .._utils import device_of
from .pairs import padding_of


@torch.no_grad()
def answer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    seed: int | None = None,
    **generation: Any,
) -> list[tuple[str, bool]]:
    """Generates an answer to each prompt, in one batch padded on the left.

    Args:
        model: A causal language model, in eval mode.
        tokenizer: Its tokenizer.
        prompts: The token ids of each prompt.
        seed: Seed of sampling, which does not affect the global generators; None to use those.
        **generation: For `model.generate`.

    Returns:
        Each answer's text without special tokens, and whether it ended before the length limit.
    """
    device = device_of(model)
    padding = padding_of(tokenizer)
    inputs = _padded(prompts, padding, device)
    options = {"pad_token_id": padding, **generation}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else [], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        output = cast(Any, model).generate(**inputs, **options)
    answers = output[:, inputs["input_ids"].shape[1] :].tolist()
    ends = end_tokens(model, tokenizer, generation.get("eos_token_id"))
    return [
        (cast(str, tokenizer.decode(ids, skip_special_tokens=True)).strip(), any(token in ends for token in ids))
        for ids in answers
    ]


def _padded(prompts: Sequence[list[int]], padding: int, device: torch.device) -> dict[str, Tensor]:
    length = max(map(len, prompts))
    ids = [[padding] * (length - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase, given: Any = None) -> set[int]:
    """The tokens that end an answer: as given, else of the generation config, else the tokenizer's."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = given if given is not None else configured if configured is not None else tokenizer.eos_token_id
    return set(cast(list[int], ends if isinstance(ends, list | tuple) else [ends]))
