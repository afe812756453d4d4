"""Lets a model answer many prompts: in shards, from which an interrupted run resumes, on one or several processes."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .._utils import at_least, begin_or_resume, evaluating, hash_model, mixed_seed, replacing
from ..errors import ConfigError
from ..scoring.generation import answer
from ..scoring.pairs import text_of


def answer_all(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    folder: Path,
    *,
    shard_size: int,
    **generation: Any,
) -> list[dict[str, Any]]:
    """Answers prompts, those of similar length in one batch.

    Args:
        model: A causal language model; active adapters steer.
        tokenizer: Its tokenizer.
        prompts: The token ids of each prompt.
        folder: Where answers are saved, and found again; the same one for all processes.
        shard_size: Answers per file, which an interruption can lose.
        **generation: `max_new_tokens`, `batch_size`, `seed`, and options of `generate`.

    Returns:
        Of each prompt, `answer`, and `finished`, whether it ended before `max_new_tokens`.

    Raises:
        ConfigError: An argument is invalid, or the folder has the answers of another run.
    """
    at_least(1, shard_size=shard_size, **{name: generation[name] for name in ("max_new_tokens", "batch_size")})
    if "max_length" in generation or generation.get("num_return_sequences", 1) != 1:
        raise ConfigError(
            "Each prompt gets one answer: omit max_length and num_return_sequences, and set max_new_tokens."
        )
    state = PartialState()
    if state.is_main_process:
        made_of = {"prompts": _hash_prompts(prompts), "model": _hash_model(model), "shard_size": shard_size}
        begin_or_resume(folder / "run.json", {**generation, **made_of})
        (folder / "answers").mkdir(exist_ok=True)
    state.wait_for_everyone()
    if not (folder / "run.json").is_file():
        raise ConfigError(
            f"output_dir={str(folder)!r} is not the folder of the main process: pass the same one to all processes."
        )
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index))
    shards = [order[start : start + shard_size] for start in range(0, len(order), shard_size)]
    files = [folder / "answers" / f"{number:05d}-of-{len(shards):05d}.jsonl" for number in range(len(shards))]
    missing = broadcast_object_list([[n for n, file in enumerate(files) if not file.is_file()]])[0]
    with evaluating(model):
        for number in missing[state.process_index :: state.num_processes]:
            desc = f"Answering, shard {number + 1} of {len(shards)}"
            _write(files[number], _shard(model, tokenizer, prompts, shards[number], desc, **generation))
    # A barrier would time out if another process takes much longer.
    while not all(file.is_file() for file in files):
        time.sleep(0.2)
    found = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return sorted(found, key=lambda each: each["row"])


def save_pairs(pairs: Dataset, folder: Path, push_to_hub: str | None) -> None:
    """Saves the pairs beside the answers, in at most as many files, and pushes them to the Hub if asked."""
    if not PartialState().is_main_process:
        return
    shards = min(len(list((folder / "answers").glob("*.jsonl"))), len(pairs))
    for old in folder.glob("pairs-*.parquet"):
        old.unlink()
    for number in range(shards):
        file = folder / f"pairs-{number:05d}-of-{shards:05d}.parquet"
        with replacing(file) as partial:
            pairs.shard(shards, number, contiguous=True).to_parquet(str(partial))
    if push_to_hub is not None:
        pairs.push_to_hub(push_to_hub)


def normalized(answer: Any) -> str:
    """An answer's text, normalised in case and whitespace."""
    text = answer if isinstance(answer, str) else " ".join(map(text_of, answer))
    return " ".join(text.split()).casefold()


def _shard(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    shard: list[int],
    desc: str,
    *,
    batch_size: int,
    seed: int,
    **generation: Any,
) -> Iterator[dict[str, Any]]:
    """Generates the answers of a shard, batch by batch."""
    with tqdm(total=len(shard), desc=desc, unit="answer") as progress:
        for start in range(0, len(shard), batch_size):
            rows = shard[start : start + batch_size]
            seed_of_batch = mixed_seed(seed, rows[0])
            answers = answer(model, tokenizer, [prompts[row] for row in rows], seed=seed_of_batch, **generation)
            for row, (text, finished) in zip(rows, answers, strict=True):
                yield {"row": row, "answer": text, "finished": finished}
            progress.update(len(rows))


def _write(file: Path, lines: Any) -> None:
    """Writes JSON lines atomically."""
    with replacing(file) as partial, partial.open("w") as opened:
        opened.writelines(json.dumps(line) + "\n" for line in lines)


def _hash_prompts(prompts: list[list[int]]) -> str:
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()


def _hash_model(model: Any) -> str:
    """Hash of a model, its adapters, its steering and its generation config."""
    generation = getattr(model, "generation_config", None) and model.generation_config.to_dict()
    return hash_model(model, sampled=True, head=repr(generation))
