"""Checks of preference datasets, before a model is loaded and after TRL has tokenized them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, cast

from datasets import Dataset, IterableDataset
from trl import DPOConfig

from ..errors import ConfigError, DatasetError
from ..scoring.checks import require_length
from ..scoring.packing import TOKENIZED
from ..scoring.pairs import require_answer

_PREFERENCE = {"chosen", "rejected"}
_COLUMNS = ("prompt", "chosen", "rejected")


def require_preferences(dataset: Any, name: str) -> None:
    """Raises unless a dataset, or each of a dict of them, holds preference pairs.

    Args:
        dataset: A `Dataset`, an `IterableDataset`, or a dict of them.
        name: What to call it in messages, such as "train_dataset".

    Raises:
        DatasetError: It is empty, lacks the columns of TRL's preference format, or has a row without an answer. Only
            the first row of a stream is checked.
    """
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            require_preferences(part, f"{name}[{key!r}]")
        return
    if not isinstance(dataset, Dataset | IterableDataset):
        return
    first = next(iter(dataset), None)
    if first is None:
        raise DatasetError(f"{name} is empty: training and evaluation need at least one preference pair.")
    columns = set(first)
    if not columns >= _PREFERENCE:
        missing = sorted(_PREFERENCE - columns)
        raise DatasetError(
            f"{name} has the columns {sorted(columns)}, but lacks {missing}: a preference dataset has 'chosen' and "
            "'rejected', and 'prompt' unless they start with it (TRL's preference format)."
        )
    present = [column for column in _COLUMNS if column in columns]
    rows = dataset.select_columns(present) if isinstance(dataset, Dataset) else [first]
    for index, row in enumerate(rows):
        _require_texts({column: dict(row)[column] for column in present}, f"Row {index} of {name}")


def _require_texts(row: dict[str, Any], where: str) -> None:
    for column, value in row.items():
        if not isinstance(value, str | list) or value == []:
            raise DatasetError(f"{where} has {column}={value!r}: must be a text or a non-empty list of messages.")
        if column != "prompt":
            require_answer(value, column, where)
    kinds = {column: "a text" if isinstance(value, str) else "messages" for column, value in row.items()}
    if len(set(kinds.values())) > 1:
        found = ", ".join(f"{column} as {kind}" for column, kind in kinds.items())
        raise DatasetError(f"{where} has {found}: give all of them as texts, or all as messages.")


def prepared_pairs(dataset: Any, name: str, args: DPOConfig, tokenize: Callable[[], Any]) -> Any:
    """Tokenizes a dataset of preference pairs, and checks that answers are left within `max_length`.

    Args:
        dataset: The pairs.
        name: What to call the dataset in messages.
        args: The training config.
        tokenize: TRL's tokenization of the dataset, which drops pairs whose prompt fills `max_length`.

    Raises:
        DatasetError: No pair is left, or several processes cannot share what one of them precomputes.
    """
    is_shared = args.precompute_ref_log_probs and args.world_size > 1
    # TRL shares what one process computes through a file beside the dataset's own.
    if is_shared and isinstance(dataset, Dataset) and not dataset.cache_files:
        raise DatasetError(
            f"The {name} dataset is in memory: to precompute the reference on several processes, save it with "
            "save_to_disk and load it with load_from_disk, so that they share what one of them computes."
        )
    tokenized = tokenize()
    is_stream = isinstance(tokenized, IterableDataset)
    left = int(next(iter(tokenized), None) is not None) if is_stream else len(tokenized)
    if not left:
        raise DatasetError(
            f"No pair of the {name} dataset is left: every prompt alone fills max_length={args.max_length}, so that no "
            "answer token would remain. Raise max_length, or shorten the prompts."
        )
    if not is_stream and left < len(dataset):
        warnings.warn(
            f"{len(dataset) - left} of {len(dataset)} pairs of the {name} dataset are left out: their prompt alone "
            f"fills max_length={args.max_length}, so that no answer token would remain.",
            UserWarning,
            stacklevel=2,
        )
    cut = sum(tokens > args.max_length for tokens in _tokens_of_pairs(tokenized)) if args.max_length else 0
    if cut:
        warnings.warn(
            f"{cut} of {left} pairs of the {name} dataset are cut to max_length={args.max_length}, so that parts of "
            "them are not trained on; `sweep` measures whole pairs. Raise max_length to train on all of them.",
            UserWarning,
            stacklevel=2,
        )
    return _with_lengths(tokenized, args)


def require_end(dataset: Any, tokenizer: Any) -> None:
    """Raises `ConfigError` if answers are texts, which TRL ends with the EOS token, and the tokenizer has none."""
    first = next(iter(dataset), None)
    is_text = isinstance(first, dict) and isinstance(first.get("chosen"), str)
    if is_text and getattr(tokenizer, "eos_token", "") is None:
        raise ConfigError("The tokenizer has no eos_token, which ends each answer: set tokenizer.eos_token.")


def require_context(dataset: Any, name: str, args: DPOConfig, base: Any) -> None:
    """Raises unless a causal language model can read all pairs of a tokenized dataset.

    Nothing is checked of streams, of images, and before the model is known (None).

    Raises:
        ConfigError: A pair, cut to `max_length`, is longer than the model's context.
    """
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            require_context(part, f"{name}[{key!r}]", args, base)
    elif base is not None and (lengths := _tokens_of_pairs(dataset)):
        tokens = max(lengths)
        what = f"A pair of {name}, cut to max_length={args.max_length},"
        require_length(base, min(tokens, args.max_length or tokens), what)


def _tokens_of_pairs(dataset: Any) -> list[int]:
    """Tokens of each pair's prompt and longer answer; none for streams, and for images, which TRL tokenizes later."""
    if not isinstance(dataset, Dataset) or not set(TOKENIZED) <= set(dataset.column_names):
        return []
    rows = cast(Iterable[Any], dataset.select_columns(list(TOKENIZED)))
    return [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows]


def _with_lengths(dataset: Any, args: DPOConfig) -> Any:
    """Adds the column that transformers' samplers group pairs by: the length of the prompt and both answers."""
    if args.train_sampling_strategy not in ("group_by_length", "batch_rebalance") or not isinstance(dataset, Dataset):
        return dataset
    if args.length_column_name in dataset.column_names:
        return dataset
    return dataset.map(
        lambda pair: {args.length_column_name: sum(len(pair[name]) for name in TOKENIZED)}, desc="Measuring lengths"
    )
