"""Scales codes so that multiplier 1 means a stated divergence from the unsteered model."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .._utils import device_of, evaluating
from ..errors import ConfigError
from ..tuner.adapters import adapter_of, record_damage, require_adding, require_enabled, write_code
from ..tuner.layer import YaPOLayer
from .checks import LAYER_ERRORS
from .neutral import NeutralText, neutral_rows

# Rows of neutral text that are read, and how many run at once.
_ROWS, _BATCH = 64, 4
# How close a divergence has to come, as a share of it, and how far off it is an error.
TOLERANCE, _MISSED = 0.02, 0.1
# How often both directions are scaled in turn at most: each hardly changes the other.
_ROUNDS = 4
# How many scales are tried, and the ratio of two scales between which no others are.
_STEPS, _NARROWEST = 40, 1.0001


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
    which act at +1, and those below, which act at -1, are scaled apart, each as near to the amount as it gets. A dense
    vector has one scale, with which neither direction exceeds the amount. The result is recorded in the adapter's
    config and saved with it.

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
        ConfigError: The adapter does not exist or is zero, `max_kl` is not positive, or no scale reaches it. The codes
            are left unchanged.
        DatasetError: The neutral text is empty, or lacks its columns.
    """
    require_bound(max_kl)
    name, config, layers = adapter_of(model, adapter_name)
    require_adding(config, name, "calibrate")
    require_enabled(model)
    codes = [(layer, name) for layer in layers]
    before = [layer.code(name).detach().clone() for layer in layers]
    if not any(bool(code.any()) for code in before):
        raise ConfigError(f"Adapter {name!r} is zero and does not steer at any scale: train or fit it first.")
    device = device_of(model)
    rows = neutral_rows(dataset, tokenizer, at_most=_ROWS)
    text = NeutralText(model, rows, device, None, adapter_name=name)
    with evaluating(model):
        found = scaled_to(codes, _fastest(text, layers[0].index), max_kl)
    if not abs(max(found.values()) / max_kl - 1) <= _MISSED:
        for layer, code in zip(layers, before, strict=True):
            write_code(layer, name, code)
        raise ConfigError(
            f"max_kl={max_kl}: no scale of adapter {name!r} has that divergence; the nearest is {found['plus']:.3g} "
            f"nats per token at multiplier +1 and {found['minus']:.3g} at -1: choose another bound, or another text."
        )
    return record_damage(model, name, layers, found)


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
    tolerance = 1e-2 if next(text.model.parameters()).dtype == torch.float32 else 1e-1
    return fast if torch.allclose(found, expected, rtol=tolerance, atol=1e-3 * tolerance) else text


def require_bound(max_kl: Any) -> None:
    """Raises `ConfigError` unless a bound of the divergence is a positive number."""
    if isinstance(max_kl, bool) or not isinstance(max_kl, Real) or not 0 < float(max_kl) < float("inf"):
        raise ConfigError(f"max_kl={max_kl!r}: must be a positive number of nats per token, such as 0.1.")


def scaled_to(
    codes: list[tuple[YaPOLayer, str]],
    text: NeutralText,
    max_kl: float,
    at_most: bool = False,
    tolerance: float = TOLERANCE,
) -> dict[str, float]:
    """Scales codes in place until both directions have a divergence, or are as near to it from below as they get.

    Args:
        codes: The layer and the adapter of each code.
        text: The neutral text.
        max_kl: The divergence, in nats per token.
        at_most: Whether codes that have less stay as they are.
        tolerance: How close the divergence has to come, as a share of it.

    Returns:
        The divergences at multipliers +1 and -1, "plus" and "minus".
    """
    before = [layer.code(name).detach().clone() for layer, name in codes]
    is_sparse = all(layer.yapo_sae[name] is not None for layer, name in codes)
    scales, known = {1: 1.0, -1: 1.0}, dict[tuple[float, float, int], float]()

    def write(scales: dict[int, float]) -> None:
        for (layer, name), code in zip(codes, before, strict=True):
            write_code(layer, name, torch.where(code > 0, scales[1] * code, scales[-1] * code))

    def divergence(sign: int, scales: dict[int, float]) -> float:
        key = (scales[1], scales[-1], sign)
        if key not in known:
            write(scales)
            progress.reset()
            progress.set_description(f"Calibrating, pass {len(known) + 1}")
            known[key] = _mean_divergence(text, sign, progress)
            progress.set_postfix_str(f"KL {known[key]:.3g} at {sign:+d}, target {max_kl:.3g}")
        return known[key]

    def of_one(sign: int, scale: float) -> float:
        return divergence(sign, {**scales, sign: scale})

    def of_both(scale: float) -> float:
        return max(divergence(sign, {sign: scale * own for sign, own in scales.items()}) for sign in scales)

    def scale_both(at_most: bool) -> None:
        scale = _scale(of_both, 1.0, max_kl, at_most, tolerance)
        scales.update({sign: scale * own for sign, own in scales.items()})

    signs = [sign for sign in scales if any(bool((sign * code > 0).any()) for code in before)]
    with tqdm(total=len(text), desc="Calibrating", unit="row") as progress:
        try:
            if signs and not at_most:
                scale_both(at_most=False)
            # An entry acts in one direction, and a little in the other, in which it cuts features.
            for _ in range(_ROUNDS if is_sparse else 0):
                last = dict(scales)
                for sign in signs:
                    scales[sign] = _scale(partial(of_one, sign), scales[sign], max_kl, at_most, tolerance)
                if scales == last:
                    break
            if signs:
                scale_both(at_most=True)
            write(scales)
            found = {"plus": divergence(1, scales), "minus": divergence(-1, scales)}
            progress.set_postfix_str(f"entries above 0 times {scales[1]:.3g}, below 0 times {scales[-1]:.3g}")
            return found
        except BaseException:
            write({1: 1.0, -1: 1.0})
            raise


def _scale(divergence: Callable[[float], float], start: float, wanted: float, at_most: bool, tolerance: float) -> float:
    """The scale that has a divergence, or the largest known one below it; the first one if there is none below.

    Secants on logarithms, on which divergences are nearly straight, within an interval that also halves.
    """
    low: tuple[float, float] | None = None
    high: tuple[float, float] | None = None
    scale = start
    for step in range(_STEPS):
        value = divergence(scale)
        if abs(value / wanted - 1) <= tolerance or (at_most and step == 0 and value < wanted):
            return scale
        if value < wanted:
            grows = low is None or scale < 2 * low[0] or value > 1.01 * low[1]
            # Rounding hides the divergence of small codes.
            if high is None and not grows and value > 1e-4 * wanted:
                break
            low = (scale, value)
        else:  # also if it overflows and is not a number
            high = (scale, value)
        if low is None or high is None:
            # Small divergences grow with the square of the scale.
            factor = (wanted / max(value, 1e-12)) ** 0.5 if value == value else 0.25
            nearest = 2.0 if step > 2 else 1.0
            scale *= min(max(factor, nearest), 10.0) if high is None else max(min(factor, 1 / nearest), 0.1)
            continue
        if high[0] / low[0] < _NARROWEST:
            break
        is_smooth = math.isfinite(high[1]) and low[1] > 0 and step % 3 > 0
        share = math.log(wanted / low[1]) / math.log(high[1] / low[1]) if is_smooth else 0.5
        scale = low[0] * (high[0] / low[0]) ** min(max(share, 0.05), 0.95)
    return start if low is None else low[0]


def measured(text: NeutralText) -> dict[str, float]:
    """The divergences at multipliers +1 and -1, "plus" and "minus", in nats per token, the mean over rows."""
    return {side: _mean_divergence(text, sign) for side, sign in (("plus", 1), ("minus", -1))}


@torch.no_grad()
def _mean_divergence(text: NeutralText, multiplier: float, progress: Any = None) -> float:
    parts: list[Tensor] = []
    for start in range(0, len(text), _BATCH):
        rows = range(start, min(start + _BATCH, len(text)))
        parts.append(text.divergence(text.model, rows, torch.full((len(rows),), float(multiplier))))
        if progress is not None:
            progress.update(len(rows))
    # Rounding can bring that of equal predictions below zero.
    return float(torch.cat(parts).mean().clamp(min=0))
