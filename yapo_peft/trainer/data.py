"""Checks of a preference dataset, before a model is loaded or trained."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, IterableDataset
from trl import DPOConfig

from ..errors import DatasetError
from ..scoring.packing import TOKENIZED

_PREFERENCE = {"chosen", "rejected"}
_COLUMNS = ("prompt", "chosen", "rejected")


def require_preferences(dataset: Any, name: str) -> None:
    """Raises unless a dataset, or each of a dict of them, holds preference pairs.

    Args:
        dataset: A `Dataset`, an `IterableDataset`, or a dict of them.
        name: What to call it in messages, such as "train_dataset".

    Raises:
        DatasetError: It is empty, lacks the columns of TRL's preference format, or has a row without an answer. Of a
            stream only the first row is looked at.
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
            raise DatasetError(
                f"{where} has {column}={value!r}: expected a text, or a list of messages that is not empty."
            )
    kinds = {column: "a text" if isinstance(value, str) else "messages" for column, value in row.items()}
    if len(set(kinds.values())) > 1:
        found = ", ".join(f"{column} as {kind}" for column, kind in kinds.items())
        raise DatasetError(f"{where} has {found}: give all of them as texts, or all as messages.")


def require_shared(dataset: Any, name: str) -> None:
    """Raises for a dataset in memory: TRL shares what one process precomputes through a file beside the dataset's.

    Raises:
        DatasetError: The dataset has no files.
    """
    if isinstance(dataset, Dataset) and not dataset.cache_files:
        raise DatasetError(
            f"The {name} dataset is in memory: to precompute the reference on several processes, save it with "
            "save_to_disk and load it with load_from_disk, so that they share what one of them computes."
        )


def require_room(before: Any, after: Any, max_length: int | None, name: str) -> str | None:
    """Compares a dataset before and after TRL dropped the pairs whose prompt fills `max_length`.

    Returns:
        A warning if some were dropped, else None.

    Raises:
        DatasetError: None is left.
    """
    if isinstance(after, IterableDataset):
        if next(iter(after), None) is None:
            raise DatasetError(_nothing_left(name, max_length))
        return None
    dropped = len(before) - len(after)
    if dropped == len(before):
        raise DatasetError(_nothing_left(name, max_length))
    if dropped:
        return (
            f"{dropped} of {len(before)} pairs of the {name} dataset are left out: their prompt alone fills "
            f"max_length={max_length}, so that no answer token would remain."
        )
    return None


def with_lengths(dataset: Any, args: DPOConfig) -> Any:
    """Adds the column of lengths that transformers' samplers group pairs by, where one of them is asked for.

    The length of a pair is that of its prompt and both of its answers.
    """
    if args.train_sampling_strategy not in ("group_by_length", "batch_rebalance") or not isinstance(dataset, Dataset):
        return dataset
    if args.length_column_name in dataset.column_names:
        return dataset
    return dataset.map(
        lambda pair: {args.length_column_name: sum(len(pair[name]) for name in TOKENIZED)}, desc="Measuring lengths"
    )


def _nothing_left(name: str, max_length: int | None) -> str:
    return (
        f"No pair of the {name} dataset is left: every prompt alone fills max_length={max_length}, so that no answer "
        "token would remain. Raise max_length, or shorten the prompts."
    )
