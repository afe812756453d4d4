"""Creates preference pairs from two descriptions: the model answers questions in both manners."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, cast

from accelerate import PartialState
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError, DatasetError
from ..scoring.pairs import chat_ids, prompt_ids
from .answering import answer_all, normalized, save_pairs
from .preferences import load_prompts, with_system_prompt
from .sources import as_message

# Answers of which more words than this are the same, in the same order, do not differ in manner.
_MOST_ALIKE = 0.9
# How answers start that decline.
_REFUSAL = re.compile(
    r"(?:(?:(?:i'?m |i am )?(?:sorry|afraid)|i apologi[sz]e)\b[^.!?]*\b(?:can(?:'?t|not)|unable|not able|won'?t)\b"
    r"|i (?:can(?:'?t|not)|am unable|will not)\b|as an ai\b|i'?m (?:unable|not able)\b|i'?m just an? (?:ai|language)"
    r"|i don'?t have (?:personal|feelings|opinions))"
)


def packaged_questions() -> list[str]:
    """The questions that come with the package: everyday, knowledge, advice, opinions and small tasks."""
    return Path(__file__).with_name("questions.txt").read_text(encoding="utf-8").splitlines()


def generate_contrast(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    towards: str,
    away: str,
    output_dir: str | Path,
    *,
    questions: Iterable[str] | Dataset | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    shard_size: int = 256,
    seed: int = 0,
    push_to_hub: str | None = None,
    **generation: Any,
) -> Dataset:
    """Creates preference pairs without a dataset: the model answers each question in two manners.

    It is told the manner by a system prompt, which is not part of the pair: an adapter that is trained on the pairs
    answers in that manner unasked. Chat templates without a system role get it in the user's message.

    Answers are saved to `output_dir/answers` in shards, from which an interrupted run resumes.

    Args:
        model: A chat model, which has to be able to follow both system prompts: small ones do so badly.
        tokenizer: Its tokenizer, with a chat template.
        towards: What the chosen answers are like, as in "answers in short plain sentences"; or a whole system prompt,
            which starts with "You ".
        away: What the rejected answers are like.
        output_dir: Folder for the answers and the pairs, `pairs-*.parquet`.
        questions: Texts, or rows with a column `prompt`; the package's questions if None.
        max_new_tokens: Maximum length of an answer.
        batch_size: Questions per batch.
        shard_size: Answers per file, which an interruption can lose.
        seed: Seed of sampling.
        push_to_hub: Dataset repository to push the pairs to.
        **generation: For `model.generate`, as in `generate_rejected`.

    Returns:
        `prompt`, `chosen` and `rejected` as messages, and `finished`, which is false if an answer was truncated. Pairs
        are dropped, and counted in what is printed, if an answer is empty or declines to answer, or if more than 90 %
        of the words of both are the same.

    Raises:
        ConfigError: A description is empty or both are the same, the tokenizer has no chat template, an argument is
            invalid, or `output_dir` has the answers of another run.
        DatasetError: There are no questions, or no pair is left.
    """
    if not towards.strip() or not away.strip() or normalized(towards) == normalized(away):
        raise ConfigError(f"towards={towards!r}, away={away!r}: describe two different manners.")
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("The tokenizer has no chat template, by which the model is told how to answer.")
    prompts = _prompts(questions)
    asked = [ids for manner in (towards, away) for ids in _rendered(prompts, tokenizer, system_prompt(manner))]
    options = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "seed": seed, **generation}
    answers = answer_all(model, tokenizer, asked, Path(output_dir), shard_size=shard_size, **options)
    pairs = _pairs(prompts, answers[: len(prompts)], answers[len(prompts) :])
    save_pairs(pairs, Path(output_dir), push_to_hub)
    return pairs


def system_prompt(manner: str) -> str:
    """The system prompt of a manner: a sentence that starts with "You " as it is; else an assistant who acts so."""
    manner = manner.strip()
    if manner.startswith("You "):
        return manner
    return f"You are an assistant who {manner.rstrip('.')}. Do so in every answer, whatever you are asked."


def _prompts(questions: Iterable[str] | Dataset | None) -> Dataset:
    if isinstance(questions, Dataset):
        return load_prompts(questions).select_columns("prompt")
    if isinstance(questions, str):
        raise DatasetError("questions is a text: pass a list of them.")
    texts = packaged_questions() if questions is None else list(questions)
    return load_prompts(Dataset.from_dict({"prompt": texts}))


def _rendered(prompts: Dataset, tokenizer: PreTrainedTokenizerBase, system: str) -> list[list[int]]:
    """The tokens of each prompt after a system prompt, or with it in the first message if the template has no role."""
    found = with_system_prompt(prompts, system, as_user=not _takes_system(tokenizer))
    return [prompt_ids(prompt, tokenizer) for prompt in found["prompt"]]


def _takes_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a chat template has a system role."""
    try:
        chat_ids([{"role": role, "content": "x"} for role in ("system", "user")], tokenizer)
    except DatasetError:
        return False
    return True


def _pairs(prompts: Dataset, chosen: list[dict[str, Any]], rejected: list[dict[str, Any]]) -> Dataset:
    """Pairs answers, and drops those without a difference in manner."""
    kept: list[dict[str, Any]] = []
    dropped = {"empty": 0, "declining to answer": 0, "alike": 0}
    for prompt, one, other in zip(cast(Iterable[Any], prompts["prompt"]), chosen, rejected, strict=True):
        texts = one["answer"], other["answer"]
        if not all(texts):
            dropped["empty"] += 1
        elif any(map(is_refusal, texts)):
            dropped["declining to answer"] += 1
        elif are_alike(*texts):
            dropped["alike"] += 1
        else:
            answers = {name: as_message(name, text) for name, text in zip(("chosen", "rejected"), texts, strict=True)}
            kept.append({"prompt": prompt, **answers, "finished": one["finished"] and other["finished"]})
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    PartialState().print(f"Created {len(kept)} pairs from {len(prompts)} questions; dropped {reasons}.")
    if not kept:
        raise DatasetError(
            f"None of {len(prompts)} questions gave a pair ({reasons}): describe manners that differ more, or use a "
            "model that follows system prompts."
        )
    return Dataset.from_list(kept)


def is_refusal(text: str) -> bool:
    """Whether an English answer starts by declining to answer."""
    return _REFUSAL.match(text.strip().casefold().replace("\u2019", "'")) is not None


def are_alike(first: str, second: str) -> bool:
    """Whether more than 90 % of the words of two answers are the same, in the same order."""
    words = normalized(first).split(), normalized(second).split()
    return SequenceMatcher(None, *words, autojunk=False).ratio() > _MOST_ALIKE
