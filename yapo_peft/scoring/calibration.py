"""Scales codes so that multiplier 1 means a stated divergence from the unsteered model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .._utils import evaluating
from ..errors import ConfigError
from ..tuner.adapters import adapter_of, require_enabled, write_code
from ..tuner.layer import YaPOLayer
from .checks import LAYER_ERRORS
from .neutral import NeutralText, neutral_rows

# Rows of neutral text that are read, and how many run at once.
_ROWS, _BATCH = 64, 4
# How close a scale has to come, and how often it is corrected at most.
_TOLERANCE, _ROUNDS = 0.01, 12


def calibrate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    max_kl: float = 0.1,
    *,
    dataset: Any = None,
    adapter_name: str | None = None,
) -> dict[str, float]:
    """Scales an adapter so that multipliers +1 and -1 each change a model's predictions by a stated amount.

    The amount is KL(unsteered || steered) of the next token on neutral text. The entries of a sparse code above zero,
    which act at +1, and those below, which act at -1, are scaled apart. A dense vector has one scale, with which
    neither direction exceeds the amount. The result is recorded in the adapter's config and saved with it.

    Args:
        model: A model with a YaPO adapter.
        tokenizer: The model's tokenizer.
        max_kl: The divergence, in nats per token.
        dataset: Neutral text: strings, or rows with a column `text` or `messages`; the package's own if None. The first
            64 rows are read, up to 128 tokens of each.
        adapter_name: The adapter; the active one if None.

    Returns:
        The divergences at multipliers +1 and -1, "plus" and "minus", in nats per token.

    Raises:
        ConfigError: There is no such adapter, it has no entries, or `max_kl` is not positive.
        DatasetError: The neutral text is empty, or lacks its columns.
    """
    if isinstance(max_kl, bool) or not 0 < max_kl < float("inf"):
        raise ConfigError(f"max_kl={max_kl!r}: must be a positive number of nats per token.")
    name, config, layers = adapter_of(model, adapter_name)
    require_enabled(model)
    codes = [layer.code(name).detach().clone() for layer in layers]
    if not any(bool(code.any()) for code in codes):
        raise ConfigError(f"Adapter {name!r} is zero and does not steer at any scale: train or fit it first.")
    device = next(p.device for p in model.parameters() if not p.is_meta)
    rows = neutral_rows(dataset, tokenizer)[:_ROWS]
    text = NeutralText(model, rows, device, None, adapter_name=name)
    with evaluating(model):
        config.damage = scaled_to(layers, name, _fastest(text, layers[0].index), max_kl)
    return config.damage


@torch.no_grad()
def _fastest(text: NeutralText, lowest: int) -> NeutralText:
    """The text with only the upper half run, unless that differs from the whole model."""
    fast, row, multiplier = text.above(lowest), [0], torch.ones(1)
    try:
        expected = text.divergence(text.model, row, multiplier)
        found = fast.divergence(text.model, row, multiplier)
    except torch.OutOfMemoryError:
        raise
    except LAYER_ERRORS:
        return text
    return fast if torch.allclose(found, expected, rtol=1e-2, atol=1e-5) else text


def scaled_to(
    layers: list[YaPOLayer], name: str, text: NeutralText, max_kl: float, at_most: bool = False
) -> dict[str, float]:
    """Scales the codes of an adapter in place until both directions have a divergence.

    Args:
        layers: The adapter's layers.
        name: The adapter.
        text: The neutral text.
        max_kl: The divergence, in nats per token.
        at_most: Whether codes that have less stay as they are.

    Returns:
        The divergences at multipliers +1 and -1, "plus" and "minus".
    """
    is_sparse = layers[0].yapo_sae[name] is not None
    with tqdm(total=None, desc="Calibrating", unit="row") as progress:
        found = measured(text, progress)
        for _ in range(_ROUNDS):
            factors = [_factor(divergence, max_kl) for divergence in found.values()]
            if not is_sparse:
                factors = [min(factors)] * 2
            if at_most:
                factors = [min(factor, 1.0) for factor in factors]
            codes = [layer.code(name).detach() for layer in layers]
            sides = [any(bool((sign * code > 0).any()) for code in codes) for sign in (1, -1)]
            left = [abs(factor - 1) for factor, there in zip(factors, sides, strict=True) if there or not is_sparse]
            if max(left) <= _TOLERANCE:
                break
            for layer, code in zip(layers, codes, strict=True):
                write_code(layer, name, torch.where(code > 0, factors[0] * code, factors[1] * code))
            found = measured(text, progress)
    return found


@torch.no_grad()
def measured(text: NeutralText, progress: Any = None) -> dict[str, float]:
    """The divergences at multipliers +1 and -1, "plus" and "minus", in nats per token, the mean over rows."""
    found: dict[str, float] = {}
    for side, multiplier in (("plus", 1.0), ("minus", -1.0)):
        parts: list[Tensor] = []
        for start in range(0, len(text), _BATCH):
            rows = range(start, min(start + _BATCH, len(text)))
            parts.append(text.divergence(text.model, rows, torch.full((len(rows),), multiplier)))
            if progress is not None:
                progress.update(len(rows))
        found[side] = float(torch.cat(parts).mean())
    return found


def _factor(divergence: float, wanted: float) -> float:
    """What a code is multiplied by, as the divergence grows with about the square of a small multiplier."""
    if divergence != divergence:
        return 0.25  # it overflows
    return min(max((wanted / max(divergence, 1e-12)) ** 0.5, 0.1), 10.0)
