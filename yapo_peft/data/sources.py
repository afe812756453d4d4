"""Loads and filters rows."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import pandas
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetsError
from pandas.errors import ParserWarning

from ..errors import ConfigError, DatasetError

# The builders of `datasets` for local files, by the ending of their names.
BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}


def load_rows(source: str | Path | Dataset, split: str = "train", **options: Any) -> Dataset:
    """Loads a dataset from a file, a folder or the Hub. All cells of a CSV or TSV file are texts, as they are written.

    Args:
        source: A CSV, TSV, JSON, JSON-lines, Parquet or Arrow file; a folder that `save_to_disk` wrote; the name of a
            dataset on the Hub; or a `Dataset`, which is returned as it is.
        split: The split of a Hub dataset or a saved `DatasetDict`; files and saved datasets have only "train".
        **options: For `datasets.load_dataset`, such as `name` or `revision`.

    Raises:
        DatasetError: The file format is not supported, `source` is not a dataset, or it has no such split.
        FileNotFoundError: The file does not exist.
        OSError: The Hub cannot be reached.
    """
    if options.get("streaming"):
        raise DatasetError("streaming=True is not supported, because all rows are read: stream the dataset yourself.")
    if isinstance(source, Dataset):
        return source
    if not isinstance(source, str | Path):
        raise DatasetError(
            f"source is a {type(source).__name__}: must be a path, the name of a Hub dataset, or a "
            "datasets.Dataset (one split of a DatasetDict; the rows of a stream by Dataset.from_list(list(stream)))."
        )
    path = Path(source)
    if path.is_dir() and ((path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()):
        saved = load_from_disk(str(path))
        return _split_of(saved if isinstance(saved, DatasetDict) else {"train": saved}, split, path)
    if is_file(path):
        if split != "train" and path.is_file():
            raise DatasetError(f"split={split!r}: {str(path)!r} is a file, which has one split; leave split out.")
        return _load_file(path, options)
    kinds = "name a file, a folder that save_to_disk wrote or that holds data files, or a dataset on the Hub"
    if not path.name:  # of which `datasets` searches everything
        raise DatasetError(f"{str(source)!r} is not a dataset: {kinds}.")
    try:
        return cast(Dataset, load_dataset(str(source), split=split, **options))
    except (ValueError, IndexError, DatasetsError) as error:
        raise DatasetError(f"{str(source)!r} is not a dataset ({error}): {kinds}.") from error


def is_file(path: Path) -> bool:
    """Whether a source is the path of a file, which need not exist."""
    return path.suffix.lower() in BUILDERS or path.is_file()


def where(dataset: Dataset, /, **values: Any) -> Dataset:
    """Selects rows by the values of columns, such as `where(rows, country="UK", split=["train", "dev"])`.

    Args:
        dataset: Any dataset.
        **values: For each column, the value to select, or a list of values.

    Raises:
        DatasetError: A column is missing or has lists, or no row has one of the values; the message says what there is.
    """
    require_columns(dataset, list(values))
    allowed = {name: value if isinstance(value, list | tuple | set) else [value] for name, value in values.items()}
    for name, wanted in allowed.items():
        there = distinct(dataset, name)
        unknown = [value for value in wanted if value not in there]
        if unknown:
            listed = ", ".join(map(repr, there[:20])) + (", ..." if len(there) > 20 else "")
            raise DatasetError(f"No row has {name}={unknown[0]!r}: use one of {listed}.")
    columns = [dataset[name] for name in allowed]
    chosen = [
        index
        for index, row in enumerate(zip(*columns, strict=True))
        if all(value in wanted for value, wanted in zip(row, allowed.values(), strict=True))
    ]
    if not chosen:
        asked = ", ".join(f"{name}={_plain(wanted)}" for name, wanted in allowed.items())
        raise DatasetError(f"No row has {asked} at the same time, though each value occurs: drop one of them.")
    return dataset.select(chosen)


def distinct(dataset: Dataset, column: str) -> list[Any]:
    """The different values of a column.

    Raises:
        DatasetError: The column has lists or messages.
    """
    if not isinstance(dataset.features[column], Value | ClassLabel):
        raise DatasetError(f"The column {column!r} has lists or mappings: choose one with texts, numbers or booleans.")
    return dataset.unique(column)


def as_text(value: Any) -> str | None:
    """The text of a cell, which may be a number; empty if it is missing, None if it is no text or not exact."""
    if isinstance(value, float):
        if abs(value) >= 2**53:
            return None
        # Whole numbers are of this type in columns with gaps.
        return "" if value != value else str(int(value) if value.is_integer() else value)
    if value is None or isinstance(value, str):
        return value or ""
    return str(value) if isinstance(value, int) else None


def as_message(column: str, text: str) -> list[dict[str, str]]:
    """The messages of a cell of pairs that is a text: the user's in the column `prompt`, the assistant's in others."""
    return [{"role": "user" if column == "prompt" else "assistant", "content": text}]


def require_columns(dataset: Dataset, names: Sequence[str]) -> None:
    """Checks that a dataset has the given columns.

    Raises:
        DatasetError: A column is missing; the message lists the existing ones.
    """
    require_among(dataset.column_names, names)


def require_among(columns: Sequence[str], names: Sequence[str]) -> None:
    """As `require_columns`, for the names of a dataset's columns."""
    missing = [name for name in names if name not in columns]
    if missing:
        there = ", ".join(map(repr, columns))
        near = [match for name in missing for match in get_close_matches(name, columns, 1)]
        meant = f" (did you mean {', '.join(map(repr, near))}?)" if near else ""
        raise DatasetError(
            f"The dataset has no column {', '.join(map(repr, missing))}{meant}: name one of its columns {there}."
        )


def require_free(names: Iterable[str], ours: Iterable[str]) -> None:
    """Raises `ConfigError` if the kept columns are not a list, or one has the name of one that is created."""
    if isinstance(names, str):
        raise ConfigError(f"keep={names!r}: must be a list of columns, such as [{names!r}].")
    taken = sorted(set(names) & set(ours))
    if taken:
        raise ConfigError(f"The column {taken[0]!r} would be overwritten: rename it first.")


def _load_file(path: Path, options: dict[str, Any]) -> Dataset:
    builder = BUILDERS.get(path.suffix.lower())
    if builder is None:
        raise DatasetError(f"{str(path)!r} has an unsupported format: must be one of {', '.join(BUILDERS)}.")
    if not path.is_file():
        raise FileNotFoundError(f"The file {str(path)!r} does not exist.")
    if builder == "csv":
        # Keeps "None" and "NA", which can be answers; and takes no column for an index where rows are too long.
        ours = {"keep_default_na": False, "index_col": False}
        options = {**ours, **({"sep": "\t"} if path.suffix.lower() == ".tsv" else {}), **options}
    try:
        if builder == "csv" and not {"features", "names", "column_names", "header", "usecols"} & set(options):
            options["features"] = Features({name: Value("string") for name in _header(path, options)})
        with warnings.catch_warnings():
            # Rows that are longer than the header would be cut.
            warnings.simplefilter("error", ParserWarning)
            rows = cast(Dataset, load_dataset(builder, data_files=str(path), split="train", **options))
        has_dates = builder == "json" and "timestamp" in str(rows.features)
        return _with_dates_as_texts(path) if has_dates and not options else rows
    except (ValueError, DatasetGenerationError, StopIteration, ParserWarning) as error:
        if "corresponds to no data" in str(error) or isinstance(error, StopIteration):
            raise DatasetError(f"{str(path)!r} has no rows.") from error
        if isinstance(error.__cause__ or error, ParserWarning):
            raise DatasetError(
                f"{str(path)!r} has rows with more fields than its header: put texts with the separator into quotes."
            ) from error
        raise DatasetError(f"{str(path)!r} cannot be read as {path.suffix[1:]}: {error.__cause__ or error}") from error


def _header(path: Path, options: dict[str, Any]) -> list[str]:
    """The names of a CSV file's columns."""
    known = set(inspect.signature(pandas.read_csv).parameters) - {"nrows", "usecols"}
    given = {name: value for name, value in options.items() if name in known}
    cells = pandas.read_csv(path, nrows=1, header=None, dtype=str, **given).iloc[0]
    names = [name or f"Unnamed: {index}" for index, name in enumerate(cells)]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise DatasetError(f"{str(path)!r} has several columns {sorted(twice)[0]!r}: rename all but one.")
    return names


def _with_dates_as_texts(path: Path) -> Dataset:
    """Reads a JSON file whose texts look like dates, which `datasets` would convert."""
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        return Dataset.from_list(json.loads(text))
    return Dataset.from_list([json.loads(line) for line in text.split("\n") if line.strip()])


def _split_of(saved: Mapping[Any, Dataset], split: str, path: Path) -> Dataset:
    if split not in saved:
        raise DatasetError(f"{str(path)!r} has no split {split!r}: use one of {', '.join(map(repr, saved))}.")
    return saved[split]


def _plain(wanted: Any) -> str:
    values = list(wanted)
    return repr(values[0]) if len(values) == 1 else f"one of {values!r}"
