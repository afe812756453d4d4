"""Finds features of an adapter's SAEs: by number, by a text on which they are active, or by their label."""

from __future__ import annotations

import re
from typing import Any, Literal, get_args

import pandas as pd
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .._utils import at_least, choice, evaluating
from ..errors import ConfigError
from ..scoring.checks import require_length
from ..steering.learning import ActiveFeatures
from ..tuner import YaPOLayer
from ..tuner.adapters import adapter_of, unsteered_outputs
from ..tuner.blocks import base_of
from .checks import features_by_layer, sae_of
from .neuronpedia import neuronpedia_labels, neuronpedia_search
from .texts import device_and_dtype, padded, tokenizer_of
from .unembedding import Unembedding

By = Literal["number", "text", "label"]
_COLUMNS = ["layer", "feature", "activation", "token", "promotes", "label"]
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
            most active at one of its tokens but the first. By "label", words to search Neuronpedia for, if it has the
            SAE and the machine is online.
        by: "number", "text" or "label".
        adapter_name: The adapter; the active one if None.
        tokenizer: The model's tokenizer; loaded by the model's name if None.
        top: Number of features per layer.
        tokens: Number of promoted tokens to list.

    Returns:
        A row per layer and feature, the best ones first: `layer`, `feature`; `activation`, the largest on the text, and
        `token`, where it is; `promotes`, the tokens whose logits the feature's direction raises the most; and `label`,
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
        found.update((index, [(feature, None, None) for feature in each]) for index, each in numbered.items())
    elif by == "text":
        found = _most_active(model, layers, name, query, tokenizer, top)
    else:
        for layer in layers:
            matches = neuronpedia_search(sae_of(layer, name).identity, query)[:top]
            found[layer.index] = [(feature, None, None) for feature in matches]
    device, _ = device_and_dtype(model)
    with evaluating(model):
        unembedding = Unembedding(model)
        tables = [
            _table(layer, name, found[layer.index], device, unembedding, tokenizer, tokens)
            for layer in layers
            if found.get(layer.index)
        ]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=_COLUMNS)


# A feature, and its largest activation on a text and the token there.
_Found = tuple[int, float | None, str | None]


@torch.no_grad()
def _most_active(
    model: nn.Module, layers: list[YaPOLayer], name: str, text: str, tokenizer: PreTrainedTokenizerBase, top: int
) -> dict[int, list[_Found]]:
    device, dtype = device_and_dtype(model)
    ids: Any = tokenizer(text)["input_ids"]
    if len(ids) < 2:
        raise ConfigError(f"query={text!r} has {len(ids)} tokens, of which the first is not read: pass a longer text.")
    require_length(base_of(model), len(ids), "The query")
    with evaluating(model):
        outputs = unsteered_outputs(model, layers, padded([ids], tokenizer, device))
    found: dict[int, list[_Found]] = {}
    for layer in layers:
        sae = sae_of(layer, name)
        # The first token is an attention sink.
        h = outputs[layer.index][0, 1:]
        active = ActiveFeatures.of(h, sae.weights(h.device, dtype))
        largest = torch.zeros(sae.identity.d_sae, device=h.device).scatter_reduce(
            0, active.feature, active.value, "amax"
        )
        values, best = largest.topk(min(top, len(largest)))
        found[layer.index] = []
        for feature, value in zip(best.tolist(), values.tolist(), strict=True):
            if value > 0:
                own = active.feature == feature
                place = 1 + int(active.token[own][active.value[own].argmax()])
                found[layer.index].append((feature, value, str(tokenizer.decode([ids[place]]))))
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
    features = [feature for feature, _, _ in found]
    rows = sae.decoder_rows(torch.tensor(features, device=device), device, torch.float32)
    labels = neuronpedia_labels(sae.identity, features)
    return pd.DataFrame(
        {
            "layer": layer.index,
            "feature": features,
            "activation": pd.Series([value for _, value, _ in found], dtype=float),
            "token": pd.Series([token for _, _, token in found], dtype=object),
            "promotes": unembedding.tokens(rows, tokenizer, tokens)[0],
            "label": pd.Series([labels.get(feature) for feature in features], dtype=object),
        }
    )
