"""Lists the features that an adapter steers, with their effects and meanings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .._utils import at_least, evaluating
from ..errors import ConfigError
from ..tuner.adapters import adapter_of, unsteered_outputs
from .checks import features_by_layer, require_multiplier
from .neuronpedia import neuronpedia_labels, neuronpedia_link
from .parts import Parts
from .texts import device_and_dtype, padded, text_batches, tokenizer_of
from .unembedding import Unembedding

_DTYPES = {
    "layer": "int64",
    "feature": "Int64",
    "value": "float64",
    "effect": "str",
    "decoder_norm": "float64",
    "reach": "float64",
    "on": "float64",
    "acts": "float64",
}


def explain(
    model: nn.Module,
    adapter_name: str | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    multiplier: float = 1.0,
    top: int | None = 50,
    features: Sequence[int] | Mapping[int, Sequence[int]] | None = None,
    tokens: int = 8,
    texts: Iterable[Any] | None = None,
    labels: bool = True,
    batch_size: int = 8,
    max_length: int = 512,
) -> pd.DataFrame:
    """Lists an adapter's features by layer, those that move activations the furthest first.

    Args:
        model: A `PeftModel` with a YaPO adapter; left unchanged.
        adapter_name: The adapter; the active one if None.
        tokenizer: The model's tokenizer; loaded by the model's name if None.
        multiplier: The multiplier to explain; a negative one lowers the features of positive entries.
        top: Number of features to list per layer; None for all.
        features: Indices of the features to list instead, or a mapping from layer index to feature indices; features
            that the adapter does not steer are skipped.
        tokens: Number of promoted and suppressed tokens to list.
        texts: Texts to count active tokens on, or rows with a column `text`, `messages`, or `prompt` and `chosen`.
        labels: Whether to fetch labels from Neuronpedia, if it has the SAE and the machine is online.
        batch_size: Texts per forward pass.
        max_length: Maximum number of tokens per text; longer texts are truncated.

    Returns:
        A row per layer and feature:

        - `layer`, `feature`: the layer and the feature; a dense vector is one row, without a feature.
        - `value`: the code's entry, or the norm of a dense vector; with `mode="clamp"`, what the feature is held at.
        - `effect`: "constant" if the feature is raised, by the same amount at each steered token; "input-dependent" if
          it is lowered, which only has an effect where it is active; with `mode="clamp"`, "held" or "turned off". An
          SAE that normalises its input also scales the effect at each token.
        - `decoder_norm`: norm of the feature's direction in the residual stream.
        - `reach`: maximum distance by which the entry moves a token, `|multiplier * value| * decoder_norm`; for an SAE
          that normalises its input, times the token's scale; NaN if the feature is held at a value.
        - `on`: share of the texts' tokens at which the feature is active; NaN without texts.
        - `acts`: share of the steered tokens at which the entry has an effect; 1 if it is constant.
        - `promotes`, `suppresses`: the tokens whose logits the entry raises and lowers the most, through the model's
          final norm and unembedding.
        - `label`, `link`: from Neuronpedia, or None.

    Raises:
        ConfigError: The adapter does not exist, or an argument is invalid.
        DatasetError: A text is not a text, messages or a row.
        UnsupportedOperationError: The model has no head or no recognisable final norm.
    """
    name, _, layers = adapter_of(model, adapter_name)
    require_multiplier(multiplier)
    at_least(1, tokens=tokens, **({} if top is None else {"top": top}))
    wanted = None if features is None else features_by_layer(features, layers, name)
    tokenizer = tokenizer_of(model, tokenizer)
    device, dtype = device_and_dtype(model)
    with evaluating(model):
        parts = [_select(Parts.of(layer, name, device, dtype), top, wanted) for layer in layers]
        batches = None if texts is None else text_batches(texts, tokenizer, batch_size, max_length, model)
        shares = None if batches is None else _active_shares(model, parts, batches, tokenizer)
        unembedding = Unembedding(model)
        tables = [
            _table(part, multiplier, unembedding, tokenizer, tokens, None if shares is None else shares[index], labels)
            for index, part in enumerate(parts)
            if len(part)
        ]
    columns = [*_DTYPES, "promotes", "suppresses", "label", "link"]
    table = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)
    return cast(pd.DataFrame, table[columns]).astype(_DTYPES)


def _select(parts: Parts, top: int | None, features: dict[int, list[int]] | None) -> Parts:
    place = torch.arange(len(parts), device=parts.entries.device)
    if features is not None:
        wanted = torch.tensor(features.get(parts.layer.index, []), dtype=torch.long)
        place = place[torch.isin(parts.features, wanted).to(place.device)]
    elif top is not None:
        place = place[:top]
    return parts.only(place)


def _table(
    parts: Parts,
    multiplier: float,
    unembedding: Unembedding,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    shares: Tensor | None,
    labels: bool,
) -> pd.DataFrame:
    layer, sae = parts.layer, parts.layer.yapo_sae[parts.adapter_name]
    values, wanted = parts.values, multiplier * parts.values
    # What is held at 0 is turned off.
    directions = torch.where(values > 0, wanted, -multiplier) if parts.clamps else wanted
    norms = parts.rows.norm(dim=1)
    promotes, suppresses = unembedding.tokens(directions[:, None] * parts.rows, tokenizer, tokens)
    features = parts.features.tolist()
    raised = (wanted > 0).tolist() if sae is not None else [True]
    effects = ["constant" if up else "input-dependent" for up in raised]
    if parts.clamps:
        effects = ["held" if up else "turned off" for up in (values > 0).tolist()]
    on = shares.tolist() if shares is not None and sae is not None else [float("nan")] * len(features)
    known = neuronpedia_labels(sae.identity, features) if sae is not None and labels else {}
    links = [None if sae is None else neuronpedia_link(sae.identity, feature) for feature in features]
    return pd.DataFrame(
        {
            "layer": layer.index,
            "feature": [None if sae is None else feature for feature in features],
            "value": (norms if sae is None else values).tolist(),
            "effect": effects,
            "decoder_norm": norms.tolist(),
            "reach": (abs(multiplier) * parts.reach).tolist(),
            "on": on,
            "acts": [1.0 if up else share for up, share in zip(raised, on, strict=True)],
            "promotes": promotes,
            "suppresses": suppresses,
            # With dtype object, or pandas would turn None into NaN.
            "label": pd.Series([known.get(feature) for feature in features], dtype=object),
            "link": pd.Series(links, dtype=object),
        }
    )


def _active_shares(
    model: nn.Module, parts: list[Parts], batches: Iterable[list[list[int]]], tokenizer: PreTrainedTokenizerBase
) -> list[Tensor]:
    """The share of tokens at which each feature is active, `(n,)` for each layer."""
    device = parts[0].entries.device
    counts = [torch.zeros(len(part), device=device) for part in parts]
    total = 0
    for batch in tqdm(batches, desc="Counting active tokens", unit="batch"):
        if not any(batch):
            continue
        inputs = padded(batch, tokenizer, device)
        real = inputs["attention_mask"].bool()
        outputs = unsteered_outputs(model, [part.layer for part in parts], inputs)
        for part, count in zip(parts, counts, strict=True):
            on, _ = part.on(outputs[part.layer.index])
            count += (on[real] > 0).sum(dim=0)
        total += int(real.sum())
    if not total:
        raise ConfigError("The texts have no tokens: pass texts that are not empty.")
    return [count / total for count in counts]
