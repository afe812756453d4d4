"""On-policy rejected answers: what the model says by itself, as the answer to part from."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .._utils import evaluating, hash_model, mixed_seed, replacing
from ..errors import ConfigError, DatasetError
from ..scoring.generation import answer
from ..scoring.pairs import prompt_ids
from .sources import require_columns

# Of each weight, for the hash that tells models apart.
_START = 1 << 12


def generate_rejected(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    output_dir: str | Path,
    *,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    shard_size: int = 256,
    seed: int = 0,
    push_to_hub: str | None = None,
    **generation: Any,
) -> Dataset:
    """Answers each prompt with the model as it is, and makes preference pairs with those answers as the rejected ones.

    Prompts of similar length are answered together. Answers are written to `output_dir/answers` a shard at a time, and
    a run that is started again goes on from there: each shard is a function of the arguments alone, so that it does not
    matter how often a run was stopped, or how many processes share the work under `accelerate launch` (with one
    `output_dir` for all of them).

    Args:
        model: A causal language model, with or without adapters; those that are active steer.
        tokenizer: Its tokenizer; its chat template renders conversational prompts.
        dataset: With `prompt` and `chosen`, texts or messages; a `rejected` that is there is replaced.
        output_dir: Where answers are kept, and the pairs as `pairs-*.parquet`.
        max_new_tokens: Of an answer.
        batch_size: Prompts at a time.
        shard_size: Answers to a file, which is what a stop can lose.
        seed: Of the sampling, if any.
        push_to_hub: Name of a dataset repository to push the pairs to.
        **generation: For `model.generate`, such as `do_sample=True`, `temperature=0.7`. What is not given here is as in
            the model's generation config.

    Returns:
        The dataset's rows in their order, with `rejected` and `finished`, which is false where the answer was cut at
        `max_new_tokens`. Left out, and counted on the screen, are answers that are empty or say the same as the chosen
        one, and pairs that are there twice.

    Raises:
        ConfigError: An argument has a value that cannot work, or `output_dir` holds another run.
        DatasetError: A column is missing or holds no text, or no pair is left.

    Source: arXiv 2601.08441, which prepares its rejected answers so.
    """
    _require_positive(max_new_tokens=max_new_tokens, batch_size=batch_size, shard_size=shard_size)
    if "max_length" in generation or generation.get("num_return_sequences", 1) != 1:
        raise ConfigError(
            "Each prompt gets one answer of max_new_tokens: leave max_length and num_return_sequences out."
        )
    require_columns(dataset, ["prompt", "chosen"])
    if not len(dataset):
        raise DatasetError("The dataset is empty: there is no prompt to answer.")
    _require_texts(dataset)
    state, folder = PartialState(), Path(output_dir)
    prompts = [prompt_ids(prompt, tokenizer) for prompt in dataset["prompt"]]
    options = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "seed": seed, **generation}
    if state.is_main_process:
        made_of = {"prompts": _hash_prompts(prompts), "model": _hash_model(model), "shard_size": shard_size}
        _begin(folder, {**options, **made_of})
    state.wait_for_everyone()
    if not (folder / "run.json").is_file():
        raise ConfigError(
            f"output_dir={str(folder)!r} is not the folder of the first process: give all of them the same."
        )
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index))
    shards = [order[start : start + shard_size] for start in range(0, len(order), shard_size)]
    files = [folder / "answers" / f"{number:05d}-of-{len(shards):05d}.jsonl" for number in range(len(shards))]
    missing = broadcast_object_list([[n for n, file in enumerate(files) if not file.is_file()]])[0]
    with evaluating(model):
        for number in missing[state.process_index :: state.num_processes]:
            said = f"Answering, shard {number + 1} of {len(shards)}"
            _write(files[number], _answers(model, tokenizer, prompts, shards[number], said, **options))
    # No barrier, which would give up on a process that has much more to do.
    while not all(file.is_file() for file in files):
        time.sleep(0.2)
    pairs = _pairs(dataset, [json.loads(line) for file in files for line in file.read_text().splitlines()], state)
    if state.is_main_process:
        _save(pairs, folder, len(shards))
        if push_to_hub is not None:
            pairs.push_to_hub(push_to_hub)
    return pairs


def _answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    shard: list[int],
    said: str,
    *,
    batch_size: int,
    seed: int,
    **generation: Any,
) -> Iterator[dict[str, Any]]:
    """The answers of a shard, a batch at a time."""
    with tqdm(total=len(shard), desc=said, unit="answer") as progress:
        for start in range(0, len(shard), batch_size):
            rows = shard[start : start + batch_size]
            seed_of_batch = mixed_seed(seed, rows[0])
            answers = answer(model, tokenizer, [prompts[row] for row in rows], seed=seed_of_batch, **generation)
            for row, (text, finished) in zip(rows, answers, strict=True):
                yield {"row": row, "answer": text, "finished": finished}
            progress.update(len(rows))


def _pairs(dataset: Dataset, answers: list[dict[str, Any]], state: PartialState) -> Dataset:
    """The dataset with the answers, less what there is nothing to learn from."""
    by_row = {found["row"]: found for found in answers}
    kept: list[dict[str, Any]] = []
    seen: set[str] = set()
    left_out = {"empty": 0, "the same as the chosen one": 0, "of a pair that is there already": 0}
    for index, row in enumerate(cast(Iterable[dict[str, Any]], dataset)):
        found = by_row[index]
        as_messages = not isinstance(row["prompt"], str)
        rejected = [{"role": "assistant", "content": found["answer"]}] if as_messages else found["answer"]
        pair = {**row, "rejected": rejected, "finished": found["finished"]}
        key = json.dumps([pair["prompt"], pair["chosen"], rejected], sort_keys=True)
        if not found["answer"]:
            left_out["empty"] += 1
        elif _said(row["chosen"]) == _said(rejected):
            left_out["the same as the chosen one"] += 1
        elif key in seen:
            left_out["of a pair that is there already"] += 1
        else:
            seen.add(key)
            kept.append(pair)
    state.print(
        f"{len(kept)} of {len(dataset)} answers make a pair; " + ", ".join(f"{n} {w}" for w, n in left_out.items())
    )
    if not kept:
        raise DatasetError(f"No pair is left of {len(dataset)}: {left_out}. Look at the answers on the disk.")
    return Dataset.from_list(kept)


def _said(answer: Any) -> str:
    """What an answer says, whatever its case and spacing."""
    text = answer if isinstance(answer, str) else " ".join(message["content"] for message in answer)
    return " ".join(text.split()).casefold()


def _begin(folder: Path, settings: dict[str, Any]) -> None:
    """Writes what a run is, or checks that it is the one that was begun."""
    try:
        settings = json.loads(json.dumps(settings))
    except TypeError as error:
        raise ConfigError(f"An option of generate cannot be written down to recognise the run by ({error}).") from error
    file = folder / "run.json"
    if not file.is_file():
        (folder / "answers").mkdir(parents=True, exist_ok=True)
        _write(file, [settings])
        return
    begun = json.loads(file.read_text())
    differing = [
        f"{name}: {begun.get(name)!r} then, {settings.get(name)!r} now"
        for name in sorted({*begun, *settings})
        if begun.get(name) != settings.get(name)
    ]
    if differing:
        raise ConfigError(
            f"{str(folder)!r} holds answers of another run ({'; '.join(differing)}). Give another output_dir, or "
            "delete that one."
        )


def _write(file: Path, lines: Any) -> None:
    """Writes JSON lines to a name of its own, and then gives it the right one."""
    with replacing(file) as partial, partial.open("w") as opened:
        opened.writelines(json.dumps(line) + "\n" for line in lines)


def _save(pairs: Dataset, folder: Path, shards: int) -> None:
    """Writes the pairs in as many files, or one for each pair if there are fewer."""
    shards = min(shards, len(pairs))
    for old in folder.glob("pairs-*.parquet"):
        old.unlink()
    for number in range(shards):
        file = folder / f"pairs-{number:05d}-of-{shards:05d}.parquet"
        with replacing(file) as partial:
            pairs.shard(shards, number, contiguous=True).to_parquet(str(partial))


def _hash_prompts(prompts: list[list[int]]) -> str:
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()


def _hash_model(model: Any) -> str:
    """What tells one model, its adapters, its steering and its way to generate from another."""
    generation = getattr(model, "generation_config", None) and model.generation_config.to_dict()
    return hash_model(model, entries=_START, head=repr(generation))


def _require_texts(dataset: Dataset) -> None:
    """Raises where a prompt or a chosen answer is no text and no messages, before anything is generated."""
    for index, row in enumerate(cast(Iterable[dict[str, Any]], dataset.select_columns(["prompt", "chosen"]))):
        for column, cell in row.items():
            texts = [cell] if not isinstance(cell, list) else [message.get("content") for message in cell]
            if not texts or not all(isinstance(text, str) for text in texts):
                raise DatasetError(f"Row {index} has {column}={cell!r}: give a text, or messages with texts.")


def _require_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ConfigError(f"{name}={value}: give a positive number.")
