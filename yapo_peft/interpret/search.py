"""Finds features of an adapter's SAEs: by number, by a text on which they are active, or by their label."""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple, get_args

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .._utils import at_least, choice, evaluating
from ..errors import ConfigError
from ..scoring.checks import context_length, require_length
from ..scoring.neutral import neutral_rows
from ..steering.learning import ActiveFeatures
from ..tuner import YaPOLayer
from ..tuner.adapters import adapter_of, unsteered_outputs
from ..tuner.blocks import base_of
from .checks import features_by_layer, sae_of
from .neuronpedia import neuronpedia_labels, neuronpedia_search
from .texts import device_and_dtype, padded, tokenizer_of
from .unembedding import Unembedding

By = Literal["number", "text", "label"]
_COLUMNS = ["layer", "feature", "activation", "token", "ratio", "promotes", "label"]
# Of the package's neutral text.
_ROWS, _BATCH = 32, 8
_NUMBER = re.compile(r"(?:(\d+):)?(\d+)")


def find_features(
    model: nn.Module,
    query: str,
    by: str = "text",
    *,
    adapter_name: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    top: int = 10,
    tokens: int = 8,
) -> pd.DataFrame:
    """Finds features of an adapter's SAEs, also those that it does not steer.

    Args:
        model: A `PeftModel` with a sparse YaPO adapter, which may be new; left unchanged.
        query: By "number", a feature such as "1965", or "14:1965" of layer 14. By "text", a text: the features that are
            more active at one of its tokens, but the first, than they usually are. By "label", words to search
            Neuronpedia for, if it has the SAE and the machine is online.
        by: "number", "text" or "label".
        adapter_name: The adapter; the active one if None.
        tokenizer: The model's tokenizer; loaded by the model's name if None.
        top: Number of features per layer.
        tokens: Number of promoted tokens to list.

    Returns:
        A row per layer and feature, the best ones first: `layer`, `feature`; `activation`, the largest on the text;
        `token`, where it is; `ratio`, of that activation to the feature's mean on the package's neutral text, plus the
        mean of all features; `promotes`, the tokens whose logits the feature's direction raises the most; and `label`,
        from Neuronpedia, or None.

    Raises:
        ConfigError: The adapter does not exist or is dense, an SAE has no such feature, or an argument is invalid.
    """
    choice(get_args(By), by=by)
    at_least(1, top=top, tokens=tokens)
    name, _, layers = adapter_of(model, adapter_name)
    tokenizer = tokenizer_of(model, tokenizer)
    if not query.strip():
        raise ConfigError("query is empty: pass a number, a text or words of a label.")
    found: dict[int, list[_Found]] = {}
    if by == "number":
        match = _NUMBER.fullmatch(query.strip())
        if match is None:
            raise ConfigError(f"query={query!r}: must be a feature such as 1965, or 14:1965 of layer 14.")
        wanted = [int(match[1])] if match[1] else [layer.index for layer in layers]
        numbered = features_by_layer({index: [int(match[2])] for index in wanted}, layers, name)
        found.update((index, [_Found(feature) for feature in each]) for index, each in numbered.items())
    elif by == "text":
        found = _most_active(model, layers, name, query, tokenizer, top)
    else:
        for layer in layers:
            matches = neuronpedia_search(sae_of(layer, name).identity, query)[:top]
            found[layer.index] = [_Found(feature) for feature in matches]
    device, _ = device_and_dtype(model)
    with evaluating(model):
        unembedding = Unembedding(model)
        tables = [
            _table(layer, name, found[layer.index], device, unembedding, tokenizer, tokens)
            for layer in layers
            if found.get(layer.index)
        ]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=_COLUMNS)


class _Found(NamedTuple):
    """A feature, and where a text makes it the most active; see `find_features`."""

    feature: int
    activation: float | None = None
    token: str | None = None
    ratio: float | None = None


def _most_active(
    model: nn.Module, layers: list[YaPOLayer], name: str, text: str, tokenizer: PreTrainedTokenizerBase, top: int
) -> dict[int, list[_Found]]:
    ids: Any = tokenizer(text)["input_ids"]
    if len(ids) < 2:
        raise ConfigError(f"query={text!r} has {len(ids)} tokens, of which the first is not read: pass a longer text.")
    require_length(base_of(model), len(ids), "The query")
    means = _mean_activations(model, layers, name, tokenizer)
    read = _active(model, layers, name, [ids], tokenizer)
    found: dict[int, list[_Found]] = {}
    for layer in layers:
        active, mean = read[layer.index], means[layer.index]
        largest = torch.zeros_like(mean).scatter_reduce(0, active.feature, active.value, "amax")
        ratios = largest / (mean + (mean.mean() or 1.0))
        found[layer.index] = []
        for feature in ratios.topk(min(top, len(ratios))).indices.tolist():
            if largest[feature] > 0:
                own = active.feature == feature
                token = tokenizer.decode([ids[1 + int(active.token[own][active.value[own].argmax()])]])
                ratio = float(ratios[feature])
                found[layer.index].append(_Found(feature, float(largest[feature]), str(token), ratio))
    return found


def _mean_activations(
    model: nn.Module, layers: list[YaPOLayer], name: str, tokenizer: PreTrainedTokenizerBase
) -> dict[int, Tensor]:
    """The mean activation of each feature on neutral text, `(d_sae,)` for each layer."""
    rows = neutral_rows(None, tokenizer)
    rows = [row[: context_length(base_of(model))] for row in rows[:: max(1, len(rows) // _ROWS)]]
    count = sum(len(row) - 1 for row in rows)
    means: dict[int, Any] = {layer.index: 0 for layer in layers}
    for start in range(0, len(rows), _BATCH):
        read = _active(model, layers, name, rows[start : start + _BATCH], tokenizer)
        for layer in layers:
            active, width = read[layer.index], sae_of(layer, name).identity.d_sae
            means[layer.index] += active.feature.bincount(active.value / count, minlength=width)
    return means


@torch.no_grad()
def _active(
    model: nn.Module, layers: list[YaPOLayer], name: str, batch: list[list[int]], tokenizer: PreTrainedTokenizerBase
) -> dict[int, ActiveFeatures]:
    """The active features of all tokens of a batch but the first of each row, an attention sink."""
    device, dtype = device_and_dtype(model)
    inputs = padded(batch, tokenizer, device)
    with evaluating(model):
        outputs = unsteered_outputs(model, layers, inputs)
    real = inputs["attention_mask"][:, 1:].bool()
    found: dict[int, ActiveFeatures] = {}
    for layer in layers:
        h = outputs[layer.index][:, 1:]
        h = h[real.to(h.device)]
        found[layer.index] = ActiveFeatures.of(h, sae_of(layer, name).weights(h.device, dtype))
    return found


def _table(
    layer: YaPOLayer,
    name: str,
    found: list[_Found],
    device: torch.device,
    unembedding: Unembedding,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
) -> pd.DataFrame:
    sae = sae_of(layer, name)
    features = [each.feature for each in found]
    rows = sae.decoder_rows(torch.tensor(features, device=device), device, torch.float32)
    labels = neuronpedia_labels(sae.identity, features)
    return pd.DataFrame(
        {
            "layer": layer.index,
            "feature": features,
            "activation": pd.Series([each.activation for each in found], dtype=float),
            "token": pd.Series([each.token for each in found], dtype=object),
            "ratio": pd.Series([each.ratio for each in found], dtype=float),
            "promotes": unembedding.tokens(rows, tokenizer, tokens)[0],
            "label": pd.Series([labels.get(feature) for feature in features], dtype=object),
        }
    )
