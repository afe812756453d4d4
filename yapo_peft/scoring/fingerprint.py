"""What tells one cache of activations from another: the tokens, and the model that reads them."""

from __future__ import annotations

import hashlib
import json
from typing import Any, cast

import torch
from datasets import Dataset
from torch import Tensor

from ..errors import UnsupportedOperationError
from ..trainer.config import YaPOTrainingConfig
from ..trainer.data import TOKENISED


def survey(dataset: Dataset, args: YaPOTrainingConfig, name: str) -> tuple[Tensor, str]:
    """Lengths of each pair's prompt and answers as the collator cuts them, `(pairs, 3)`, and a hash of their tokens."""
    limit = args.max_length
    digest = hashlib.sha256(str(limit).encode())
    lengths = []
    for rows in dataset.select_columns(list(TOKENISED)).iter(1000):
        columns = [cast(dict[str, Any], rows)[column] for column in TOKENISED]
        digest.update(json.dumps(columns).encode())
        lengths += [[len(part) for part in pair] for pair in zip(*columns, strict=True)]
    found = torch.tensor(lengths)
    if limit is None:
        return found, digest.hexdigest()
    too_long = (found[:, :1] + found[:, 1:] > limit).any()
    if too_long and args.truncation_mode != "keep_start":
        raise UnsupportedOperationError(
            f"truncation_mode={args.truncation_mode!r} cuts the prompts of the {name} dataset's longest pairs, for "
            "each answer elsewhere: cache_activations needs truncation_mode='keep_start', or a larger max_length."
        )
    found[:, 1:] = torch.minimum(found[:, 1:], limit - found[:, :1])
    return found, digest.hexdigest()
