"""What identifies a cache of activations: the tokens, the model, the layer and its SAE."""

from __future__ import annotations

import hashlib
import json
from typing import Any, cast

import torch
from datasets import Dataset
from torch import Tensor

from ..errors import UnsupportedOperationError

# The columns of a preference dataset that TRL has tokenized.
TOKENIZED = ("prompt_ids", "chosen_ids", "rejected_ids")


def survey(dataset: Dataset, max_length: int | None, truncation_mode: str, name: str) -> tuple[Tensor, str]:
    """Returns the lengths of each pair's prompt and answers after truncation, `(pairs, 3)`, and a hash of their tokens.

    Raises:
        UnsupportedOperationError: Truncation would cut a pair's prompt differently for its two answers.
    """
    digest = hashlib.sha256(str(max_length).encode())
    lengths = []
    for rows in dataset.select_columns(list(TOKENIZED)).iter(1000):
        columns = [cast(dict[str, Any], rows)[column] for column in TOKENIZED]
        digest.update(json.dumps(columns).encode())
        lengths += [[len(part) for part in pair] for pair in zip(*columns, strict=True)]
    found = torch.tensor(lengths)
    if max_length is None:
        return found, digest.hexdigest()
    too_long = (found[:, :1] + found[:, 1:] > max_length).any()
    if too_long and truncation_mode != "keep_start":
        raise UnsupportedOperationError(
            f"truncation_mode={truncation_mode!r} cuts the prompts of the longest pairs of the {name} dataset "
            "differently for each answer: cache_activations needs truncation_mode='keep_start', or a larger max_length."
        )
    found[:, 1:] = torch.minimum(found[:, 1:], max_length - found[:, :1])
    return found, digest.hexdigest()


def fingerprint_of(record: dict[str, Any]) -> str:
    """The name of the folder that holds the activations of a record."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:32]
