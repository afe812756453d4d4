"""Compares adapters: their features, their vectors in the residual stream, and their effects."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .._utils import at_least
from ..errors import ConfigError
from ..evaluation.sweep import sweep
from ..sae import FrozenSAE
from ..steering.formula import vector_of
from ..tuner import YaPOConfig, YaPOLayer
from ..tuner.adapters import adapter_of
from .checks import require_multiplier
from .regression import sparse_regression
from .texts import device_and_dtype, tokenizer_of


@dataclass(frozen=True)
class _Code:
    """A code or vector at a layer: itself, its SAE, and its shift of each token at multipliers +1 and -1."""

    values: Tensor
    sae: FrozenSAE | None
    up: Tensor
    down: Tensor


def compare(
    model: nn.Module,
    adapters: Sequence[str] | None = None,
    *,
    dataset: Iterable[dict[str, Any]] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    multiplier: float = 1.0,
    features: int = 32,
    batch_size: int = 8,
) -> pd.DataFrame:
    """Compares adapters of a model, pairwise and layer by layer. The model is not changed.

    Adapters of different methods can be compared: a dense vector is read in the features of the other's SAE by sparse
    regression on its decoder (see `read_vector`).

    Args:
        model: A `PeftModel` with YaPO adapters.
        adapters: Their names; all YaPO adapters if None.
        dataset: Preference pairs, to compare what adapters do to them; None to leave that out.
        tokenizer: The model's, for the dataset; found by the model's name if None.
        multiplier: The multiplier at which they are compared on the dataset.
        features: How many features of a dense vector to read.
        batch_size: Rows per forward pass.

    Returns:
        A row per pair of adapters and layer that both steer, with `a`, `b` and `layer`, and NaN where a comparison
        makes no sense:

        - `features_a`, `features_b`, `shared`: how many features each moves, and how many both.
        - `overlap`: `shared` by the number of those that at least one moves.
        - `same_sign`: share of the shared features that both move the same way.
        - `code_cosine`: of the codes, or the dense vectors.
        - `up_cosine`, `down_cosine`: of what they add to every token at multiplier 1, and at -1, in the residual
        stream.
        - `effect_correlation`: over the pairs of the dataset, of how far each moves the margin; the same in each row of
          two adapters.

    Raises:
        ConfigError: There is no such adapter, or fewer than two.
        DatasetError: The dataset is empty, or a pair lacks a column or an answer.
    """
    configs = cast(dict[str, Any], getattr(model, "peft_config", {}))
    names = list(adapters or [name for name, config in configs.items() if isinstance(config, YaPOConfig)])
    if len(set(names)) < 2 or isinstance(adapters, str):
        raise ConfigError(
            f"adapters={adapters!r}: a comparison needs two adapters at least; there are {sorted(configs)}."
        )
    at_least(1, features=features, batch_size=batch_size)
    require_multiplier(multiplier)
    layers = {name: {layer.index: layer for layer in adapter_of(model, name)[2]} for name in names}
    device, _ = device_and_dtype(model)
    effects: dict[str, np.ndarray] = {}
    if dataset is not None:
        pairs, tokenizer = list(dataset), tokenizer_of(model, tokenizer)
        for name in tqdm(names, desc="Measuring effects", unit="adapter"):
            scores = sweep(
                model, pairs, tokenizer, (0.0, multiplier), adapter_name=name, batch_size=batch_size
            ).table.pivot_table(index="example", columns="multiplier", values="margin")
            effects[name] = (scores[multiplier] - scores[0.0]).to_numpy()
    rows = [
        {
            "a": a,
            "b": b,
            "layer": index,
            **_at_block(layers[a][index], a, layers[b][index], b, device, features),
            "effect_correlation": _correlation(effects[a], effects[b]) if effects else float("nan"),
        }
        for a, b in combinations(dict.fromkeys(names), 2)
        for index in sorted(layers[a].keys() & layers[b].keys())
    ]
    return pd.DataFrame(rows, columns=_COLUMNS)


_COLUMNS = [
    "a", "b", "layer", "features_a", "features_b", "shared", "overlap", "same_sign", "code_cosine", "up_cosine",
    "down_cosine", "effect_correlation",
]  # fmt: skip


def read_vector(
    model: nn.Module,
    adapter_name: str | None = None,
    *,
    sae_of: str,
    features: int = 32,
) -> pd.DataFrame:
    """Reads the vectors of a dense adapter in the features of the SAEs of a sparse one at the same layers.

    Args:
        model: A `PeftModel` with both adapters.
        adapter_name: The dense adapter; the active one if None.
        sae_of: The sparse adapter whose SAEs are used.
        features: How many features to explain each vector with.

    Returns:
        A row per layer and feature, `layer` and `feature`, those of the largest `weight` first: `weight` is the
        feature's coefficient in `vector ~ sum of weight * decoder row` with few features, by orthogonal matching
        pursuit; `encoder`, by how much the vector moves the feature's pre-activation, its product with the encoder's
        column; `explained`, the share of the vector's squared length that all listed features of the layer explain
        together.

    Raises:
        ConfigError: An adapter is missing, of the wrong space, or both steer no common layer.
    """
    name, config, layers = adapter_of(model, adapter_name)
    other, sparse, sparse_layers = adapter_of(model, sae_of)
    if config.space != "dense" or sparse.space != "sae":
        raise ConfigError(
            f"{name!r} has space={config.space!r} and {other!r} has space={sparse.space!r}: read a dense adapter with "
            "the SAEs of a sparse one."
        )
    at_least(1, features=features)
    saes = {layer.index: layer.yapo_sae[other] for layer in sparse_layers}
    device, _ = device_and_dtype(model)
    tables: list[pd.DataFrame] = []
    for layer in layers:
        sae = saes.get(layer.index)
        if sae is None:
            continue
        vector = layer.code(name).detach().to(device)
        found, weights, explained = sparse_regression(vector, sae.decoder(device, torch.float32), features)
        encoder = vector @ sae.weights(device, torch.float32).W_enc[:, found]
        columns = {"feature": found.tolist(), "weight": weights.tolist(), "encoder": encoder.tolist()}
        tables.append(pd.DataFrame({"layer": layer.index, **columns, "explained": explained}))
    if not tables:
        raise ConfigError(f"{name!r} steers layers {[layer.index for layer in layers]}, and {other!r} {sorted(saes)}.")
    return pd.concat(tables, ignore_index=True)


def _at_block(
    layer_a: YaPOLayer, a: str, layer_b: YaPOLayer, b: str, device: torch.device, features: int
) -> dict[str, Any]:
    one, two = _code(layer_a, a, device), _code(layer_b, b, device)
    result: dict[str, Any] = {
        "up_cosine": _cosine(one.up, two.up),
        "down_cosine": _cosine(one.down, two.down),
        "code_cosine": _cosine(one.values, two.values) if _same_space(one, two) else float("nan"),
    }
    first, second = _in_features(one, two, device, features), _in_features(two, one, device, features)
    if first is None or second is None:
        return result
    shared = (first != 0) & (second != 0)
    either, count = int(((first != 0) | (second != 0)).sum()), int(shared.sum())
    return {
        **result,
        "features_a": int(first.count_nonzero()),
        "features_b": int(second.count_nonzero()),
        "shared": count,
        "overlap": count / either if either else float("nan"),
        "same_sign": float((first * second > 0).sum()) / count if count else float("nan"),
    }


def _code(layer: YaPOLayer, name: str, device: torch.device) -> _Code:
    values, sae = layer.code(name).detach().to(device), layer.yapo_sae[name]
    return _Code(values, sae, vector_of(values, sae, sign=1), -vector_of(values, sae, sign=-1))


def _same_space(one: _Code, two: _Code) -> bool:
    if one.sae is None or two.sae is None:
        return one.sae is two.sae
    return one.sae.identity.content_hash == two.sae.identity.content_hash


def _in_features(own: _Code, other: _Code, device: torch.device, features: int) -> Tensor | None:
    """What a code moves in the features of both; None where they have none in common."""
    if own.sae is not None:
        return own.values if other.sae is None or _same_space(own, other) else None
    if other.sae is None:
        return None
    decoder = other.sae.decoder(device, torch.float32)
    found, weights, _ = sparse_regression(own.values, decoder, features)
    return torch.zeros(len(decoder), device=device).scatter(0, found, weights)


def _cosine(one: Tensor, two: Tensor) -> float:
    """NaN where one of them is zero, which points nowhere."""
    return float(cosine_similarity(one, two, dim=0)) if one.any() and two.any() else float("nan")


def _correlation(one: np.ndarray, two: np.ndarray) -> float:
    """NaN of fewer than two pairs, or where an adapter moves all of them alike."""
    return float(np.corrcoef(one, two)[0, 1]) if len(one) > 1 and one.std() and two.std() else float("nan")
