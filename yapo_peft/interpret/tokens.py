"""Measures the effect of steering on each token of a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .._utils import at_least, evaluating
from ..errors import ConfigError
from ..scoring.checks import require_length
from ..tuner import YaPOLayer, steering
from ..tuner.adapters import adapter_of
from ..tuner.blocks import base_of, hidden_states
from ..tuner.hooks import forward_hooks
from .parts import Parts
from .texts import answer_start, device_and_dtype, padded, tokenizer_of, tokens_of


@dataclass(frozen=True)
class TokenEffects:
    """The effect of steering on each token of a prompt.

    Attributes:
        tokens: A row per layer and token: `layer`, `position`, `token` (its text), `norm` (of the layer's output before
            steering), `moved` (the norm of the shift), `share` (`moved / norm`), and how many of the adapter's features
            were `on` (active before steering), `raised`, `lowered` (but still active) and `cut` (to zero).
        features: A row per layer, token and feature: `layer`, `position`, `feature`, `on` (its activation before
            steering), `change` (of the activation), and `effect`, "raised", "lowered" or "cut". Lists all features that
            were active, and the inactive ones that moved the token the furthest.
    """

    tokens: pd.DataFrame
    features: pd.DataFrame


def token_effects(
    model: nn.Module,
    prompt: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    adapter_name: str | None = None,
    multiplier: float = 1.0,
    top: int = 20,
) -> TokenEffects:
    """Measures which features steering raises or lowers at each token of a prompt, and how far it moves the token.

    With several steered layers, each is measured while the lower ones steer. An adapter that steers only answers needs
    a row with a prompt and an answer; it does not steer a prompt alone.

    Args:
        model: A `PeftModel` with a YaPO adapter; left unchanged.
        prompt: A text, messages, or a row with a prompt and its chosen answer.
        tokenizer: The model's tokenizer; loaded by the model's name if None.
        adapter_name: The adapter; the active one if None.
        multiplier: The multiplier.
        top: Number of raised features to list per token that were inactive before steering.

    Raises:
        ConfigError: The adapter does not exist, an argument is invalid, or the prompt is empty or too long.
        DatasetError: The prompt is not a text, messages or a row.
    """
    name, _, layers = adapter_of(model, adapter_name)
    at_least(0, top=top)
    tokenizer = tokenizer_of(model, tokenizer)
    ids = tokens_of(prompt, tokenizer)
    if not ids:
        raise ConfigError("The prompt is empty: pass at least one token.")
    require_length(base_of(model), len(ids), "The prompt")
    texts = [cast(str, tokenizer.decode([token])) for token in ids]
    found: dict[int, dict[str, Any]] = {}

    def read(layer: YaPOLayer, output: Any) -> None:
        h = hidden_states(output)
        parts = Parts.of(layer, name, h.device, h.dtype)
        on, _ = parts.on(h)
        found[layer.index] = {"h": h[0], "on": on[0], "moved": parts.moved(h, multiplier)[0], "parts": parts}

    device, _ = device_and_dtype(model)
    inputs, start = padded([ids], tokenizer, device), answer_start(prompt, ids, tokenizer)
    if start is not None and any(layer.positions[name] != "all" for layer in layers):
        inputs["labels"] = inputs["input_ids"].clone()
        inputs["labels"][:, :start] = -100
    reading = forward_hooks(((layer.block, partial(read, layer)) for layer in layers), prepend=True)
    with evaluating(model), torch.no_grad(), steering(model, multiplier, name), reading:
        model(**inputs, use_cache=False)
    tables = [_tables(layer.index, texts, top=top, **found[layer.index]) for layer in layers]
    tokens, features = (pd.concat(column, ignore_index=True) for column in zip(*tables, strict=True))
    return TokenEffects(tokens, features)


def _tables(
    layer: int, texts: list[str], h: Tensor, on: Tensor, moved: Tensor, parts: Parts, top: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    norm, distance = h.float().norm(dim=-1), (moved @ parts.rows).norm(dim=-1)
    is_on = on > 0
    raised, lowered = moved > 0, moved < 0
    # The scale of the SAE's output is not part of the feature.
    scale = 1.0 if parts.sae is None else parts.sae.normalize(h)[1]
    change = moved if scale is None else moved / scale
    cut = lowered & (on + change <= 1e-6 * on.abs().clamp(min=1))
    if parts.sae is None:
        is_on, raised, lowered, cut = (torch.zeros_like(is_on) for _ in range(4))
    counts = {"on": is_on, "raised": raised, "lowered": lowered & ~cut, "cut": cut}
    tokens = pd.DataFrame(
        {
            "layer": layer,
            "position": range(len(texts)),
            "token": texts,
            "norm": norm.tolist(),
            "moved": distance.tolist(),
            "share": (distance / norm).tolist(),
            **{key: value.sum(dim=-1).tolist() for key, value in counts.items()},
        }
    )
    listed = is_on & (moved != 0)
    if parts.sae is not None and top and len(parts):
        reach = (moved.abs() * parts.rows.norm(dim=1)).masked_fill(is_on, 0)
        best = reach.topk(min(top, len(parts)), dim=-1).indices
        listed |= torch.zeros_like(listed).scatter(1, best, True) & (reach > 0)
    position, which = listed.nonzero(as_tuple=True)
    effect = torch.where(cut, 2, torch.where(lowered, 1, 0))[position, which]
    features = pd.DataFrame(
        {
            "layer": layer,
            "position": position.tolist(),
            "feature": parts.features[which.cpu()].tolist(),
            "on": on[position, which].tolist(),
            "change": change[position, which].tolist(),
            "effect": [("raised", "lowered", "cut")[kind] for kind in effect.tolist()],
        }
    )
    return tokens, features
