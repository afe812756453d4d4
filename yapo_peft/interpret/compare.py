"""Compares adapters by their features, their vectors in the residual stream, and their effects."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
from ..steering.formula import vector_of
from ..steering.reach import reach
from ..tuner import YaPOConfig, YaPOLayer
from ..tuner.adapters import adapter_of, require_adding
from .checks import require_multiplier
from .regression import sparse_regression
from .texts import device_and_dtype, tokenizer_of


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
    """Compares adapters of a model, pairwise and layer by layer.

    A dense adapter can be compared with a sparse one: its vector is decomposed into features of the other's SAE by
    sparse regression (see `read_vector`).

    Args:
        model: A `PeftModel` with YaPO adapters; left unchanged.
        adapters: Names of the adapters; all YaPO adapters if None.
        dataset: Preference pairs to compare the adapters' effects on; None to skip that.
        tokenizer: The model's tokenizer, for the dataset; loaded by the model's name if None.
        multiplier: The multiplier for the comparison on the dataset.
        features: Number of features to decompose a dense vector into.
        batch_size: Rows per forward pass.

    Returns:
        A row per pair of adapters and layer that both steer, with `a`, `b` and `layer`; NaN where a comparison is
        undefined:

        - `features_a`, `features_b`, `shared`: number of features that each steers, and that both steer.
        - `overlap`: `shared` divided by the number of features that at least one steers.
        - `same_sign`: share of the shared features with the same sign in both.
        - `code_cosine`: cosine similarity of the codes, or of the dense vectors.
        - `up_cosine`, `down_cosine`: cosine similarity of what they add to every token in the residual stream, at
          multipliers 1 and -1.
        - `effect_correlation`: correlation, over the pairs of the dataset, of the changes of the margin; the same for
          all layers.

    Raises:
        ConfigError: An adapter does not exist or holds features at values, or there are fewer than two.
        DatasetError: The dataset is empty, or a pair has no answer or lacks a column.
    """
    layers = _layers_by_adapter(model, adapters)
    at_least(1, features=features, batch_size=batch_size)
    require_multiplier(multiplier)
    device, _ = device_and_dtype(model)
    effects: dict[str, np.ndarray] = {}
    if dataset is not None:
        pairs, tokenizer = list(dataset), tokenizer_of(model, tokenizer)
        for name in tqdm(layers, desc="Measuring effects", unit="adapter"):
            scores = sweep(
                model, pairs, tokenizer, (0.0, multiplier), adapter_name=name, batch_size=batch_size
            ).table.pivot_table(index="example", columns="multiplier", values="margin")
            effects[name] = (scores[multiplier] - scores[0.0]).to_numpy()
    rows = [
        {
            "a": a,
            "b": b,
            "layer": index,
            **_compared(layers[a][index], a, layers[b][index], b, device, features),
            "effect_correlation": _correlation(effects[a], effects[b]) if effects else float("nan"),
        }
        for a, b in combinations(layers, 2)
        for index in sorted(layers[a].keys() & layers[b].keys())
    ]
    return pd.DataFrame(rows, columns=_COLUMNS)


_COLUMNS = [
    "a", "b", "layer", "features_a", "features_b", "shared", "overlap", "same_sign", "code_cosine", "up_cosine",
    "down_cosine", "effect_correlation",
]  # fmt: skip


def compare_features(
    model: nn.Module, adapters: Sequence[str] | None = None, *, top: int | None = None, features: int = 32
) -> pd.DataFrame:
    """Lists the features of several adapters side by side: those that they share, and those that they do not.

    Args:
        model: A `PeftModel` with YaPO adapters.
        adapters: Names of the adapters; all YaPO adapters if None.
        top: Number of features to list per layer; None for all.
        features: Number of features to decompose a dense vector into, as in `compare`.

    Returns:
        A row per layer and feature that at least one adapter steers, by layer, those that move activations the furthest
        first:

        - `layer`, `feature`: the layer and the feature.
        - `reach`: the maximum distance by which one of the adapters moves a token with it, at multiplier 1.
        - for each adapter, a column of its name: the code's entry; NaN if it does not steer the feature.

        Layers where all adapters are dense have no rows.

    Raises:
        ConfigError: An adapter does not exist, there are fewer than two, or they have different SAEs at a layer.
    """
    layers = _layers_by_adapter(model, adapters)
    at_least(1, features=features, **({} if top is None else {"top": top}))
    device, _ = device_and_dtype(model)
    tables: list[pd.DataFrame] = []
    for index in sorted({index for of in layers.values() for index in of}):
        here = {name: of[index] for name, of in layers.items() if index in of}
        saes = {name: sae for name, layer in here.items() if (sae := layer.yapo_sae[name]) is not None}
        if not saes:
            continue
        first = next(iter(saes))
        for name, sae in saes.items():
            if sae.identity.content_hash != saes[first].identity.content_hash:
                raise ConfigError(
                    f"Adapters {first!r} and {name!r} have different SAEs at layer {index}, so that their features are "
                    "not the same: compare their vectors with compare()."
                )
        for name, layer in here.items():
            code, sae = layer.code(name).detach().to(device), saes.get(name, saes[first])
            if name not in saes:
                code = _decomposed(code, sae.decoder(device, torch.float32), features)
            own = code.nonzero().squeeze(-1)
            columns = {"feature": own.tolist(), "value": code[own].tolist(), "reach": reach(code, sae)[own].tolist()}
            if len(own):
                tables.append(pd.DataFrame({"layer": index, "adapter": name, **columns}))
    columns = ["layer", "feature", "adapter", "value", "reach"]
    rows: Any = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)
    table = rows.pivot(index=["layer", "feature"], columns="adapter", values="value").reindex(columns=list(layers))
    table.insert(0, "reach", rows.groupby(["layer", "feature"])["reach"].max())
    table = table.rename_axis(columns=None).reset_index()
    table = table.sort_values(["layer", "reach"], ascending=[True, False], kind="stable", ignore_index=True)
    return table if top is None else table.groupby("layer").head(top).reset_index(drop=True)


def read_vector(
    model: nn.Module,
    adapter_name: str | None = None,
    *,
    sae_of: str,
    features: int = 32,
) -> pd.DataFrame:
    """Decomposes the vectors of a dense adapter into features of a sparse adapter's SAEs at the same layers.

    Args:
        model: A `PeftModel` with both adapters.
        adapter_name: The dense adapter; the active one if None.
        sae_of: The sparse adapter whose SAEs to use.
        features: Number of features per vector.

    Returns:
        A row per layer and feature, the largest absolute weights first:

        - `layer`, `feature`: the layer and the feature.
        - `weight`: the feature's coefficient in `vector ~ sum of weight * decoder row`, by orthogonal matching pursuit.
        - `encoder`: the change of the feature's pre-activation by the vector, its product with the encoder's column.
        - `explained`: share of the vector's squared norm that the listed features of the layer explain together.

    Raises:
        ConfigError: An adapter does not exist or has the wrong space, or the adapters have no layer in common.
    """
    name, config, layers = adapter_of(model, adapter_name)
    other, sparse, sparse_layers = adapter_of(model, sae_of)
    if config.space != "dense" or sparse.space != "sae":
        raise ConfigError(
            f"Adapter {name!r} has space={config.space!r} and {other!r} has space={sparse.space!r}: pass a dense "
            "adapter_name and a sparse sae_of."
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
        raise ConfigError(
            f"Adapter {name!r} steers layers {[layer.index for layer in layers]}, but {other!r} has SAEs at layers "
            f"{sorted(saes)}: pass adapters with a layer in common."
        )
    return pd.concat(tables, ignore_index=True)


def _layers_by_adapter(model: nn.Module, adapters: Sequence[str] | None) -> dict[str, dict[int, YaPOLayer]]:
    """The layers of each adapter, by their index.

    Raises:
        ConfigError: There are fewer than two adapters, or one holds features at values.
    """
    configs = cast(dict[str, Any], getattr(model, "peft_config", {}))
    names = list(adapters or [name for name, config in configs.items() if isinstance(config, YaPOConfig)])
    if len(set(names)) < 2 or isinstance(adapters, str):
        raise ConfigError(f"adapters={adapters!r}: must be at least two names from {sorted(configs)}.")
    found = {name: adapter_of(model, name) for name in names}
    for name, (_, config, _) in found.items():
        require_adding(config, name, "Comparing features")
    return {name: {layer.index: layer for layer in layers} for name, (_, _, layers) in found.items()}


def _compared(
    layer_a: YaPOLayer, a: str, layer_b: YaPOLayer, b: str, device: torch.device, features: int
) -> dict[str, Any]:
    both = ((layer_a, a), (layer_b, b))
    codes = [layer.code(name).detach().to(device) for layer, name in both]
    saes = [layer.yapo_sae[name] for layer, name in both]
    hashes = [sae and sae.identity.content_hash for sae in saes]
    result = {
        "up_cosine": _cosine(*(vector_of(code, sae, sign=1) for code, sae in zip(codes, saes, strict=True))),
        "down_cosine": _cosine(*(vector_of(code, sae, sign=-1) for code, sae in zip(codes, saes, strict=True))),
        "code_cosine": _cosine(*codes) if hashes[0] == hashes[1] else float("nan"),
    }
    sae = saes[0] or saes[1]
    if sae is None or (None not in hashes and hashes[0] != hashes[1]):
        return result
    first, second = (
        code if own is not None else _decomposed(code, sae.decoder(device, torch.float32), features)
        for code, own in zip(codes, saes, strict=True)
    )
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


def _decomposed(vector: Tensor, decoder: Tensor, features: int) -> Tensor:
    """The code, `(d_sae,)`, of the few features that approximate a vector."""
    found, weights, _ = sparse_regression(vector, decoder, features)
    return torch.zeros(len(decoder), device=vector.device).scatter(0, found, weights)


def _cosine(one: Tensor, two: Tensor) -> float:
    """The cosine similarity; NaN if one of the vectors is zero."""
    return float(cosine_similarity(one, two, dim=0)) if one.any() and two.any() else float("nan")


def _correlation(one: np.ndarray, two: np.ndarray) -> float:
    """The correlation; NaN for fewer than two pairs, or if an effect is the same on all of them."""
    return float(np.corrcoef(one, two)[0, 1]) if len(one) > 1 and one.std() and two.std() else float("nan")
