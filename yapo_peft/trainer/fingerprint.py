"""What tells one cache of activations from another: the tokens, and the model that reads them."""

from __future__ import annotations

import hashlib
import json
from typing import Any, cast

import torch
from datasets import Dataset
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from ..errors import UnsupportedOperationError
from ..sae.identity import hash_tensors
from ..tuner import YaPOLayer
from ..tuner.layer import is_code
from .config import YaPOTrainingConfig
from .data import TOKENISED


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


def hash_model(model: Any) -> str:
    """A hash of all that decides what the model computes without steering."""
    config = json.loads(model.config.to_json_string(use_diff=False))
    for name in ("_name_or_path", "transformers_version", "use_cache"):
        config.pop(name, None)
    head = [json.dumps(config, sort_keys=True)]
    for name, module in model.named_modules():
        # What another method's adapter does is not in its tensors alone.
        if isinstance(module, BaseTunerLayer) and not isinstance(module, YaPOLayer):
            state = (module.active_adapters, module.disable_adapters, module.merged_adapters)
            head.append(repr((name, *state, getattr(module, "scaling", None))))
    tensors = [(name, value) for name, value in sorted(model.state_dict().items()) if isinstance(value, Tensor)]
    offloaded = [name for name, tensor in tensors if tensor.is_meta]
    if offloaded:
        raise UnsupportedOperationError(
            f"cache_activations=True cannot tell which model it is for: {offloaded[0]!r} is offloaded. Load the model "
            "without offloading, or train without the cache."
        )
    return hash_tensors("".join(head), ((name, tensor) for name, tensor in tensors if not is_code(name)))
