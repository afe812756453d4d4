"""Converts the TopK SAEs of an adapter to JumpReLU, whose features can be read apart from each other."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .._utils import device_of, evaluating
from ..errors import ConfigError
from ..sae import FrozenSAE
from ..sae.identity import content_hash
from ..scoring.calibration import measured
from ..scoring.checks import context_length
from ..scoring.neutral import NeutralText, neutral_rows
from ..tuner import YaPOLayer, steering
from ..tuner.adapters import layers_of, record_damage, require_enabled
from ..tuner.blocks import base_of
from ..tuner.hooks import block_outputs

# One row in four is held out; this many of them are compared, and on as many as `calibrate` reads damage is measured.
_HELD_OUT, _COMPARED, _CALIBRATED = 4, 128, 64
# Pre-activations that are kept to fit thresholds, and features that are fitted at once: a few GiB in all.
_MOST_VALUES, _AT_ONCE = 1 << 28, 256


@torch.no_grad()
def convert_to_jumprelu(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Iterable[Any] | None = None,
    *,
    adapter_name: str | None = None,
) -> dict[str, float]:
    """Replaces the TopK SAEs of a trained adapter by JumpReLU SAEs with the same encoder and decoder.

    In a TopK SAE, the features of a token compete, so lowering one of them takes the whole encoder. Instead, each
    feature of the code gets a threshold: the one whose activations differ the least from those of the TopK SAE on text,
    in their sum. Other features get the mean of the lowest activation of a token, as sae-lens does for BatchTopK. The
    adapter becomes self-contained: a few kilobytes per feature steer at multipliers of both signs, without the SAE.

    The conversion is an approximation, which is measured on text that the thresholds were not fitted on, and recorded
    in the adapter's config and on its card. Convert last: training, other codes and other features need the TopK SAE.

    Args:
        model: A model with a YaPO adapter.
        tokenizer: The model's tokenizer.
        dataset: Text to fit the thresholds on, as for `calibrate`: at least four rows, of which a quarter is held out;
            the package's neutral text if None.
        adapter_name: The adapter; the active one if None.

    Returns:
        `differ`: of the code's features that are active at a token in one of the two SAEs, the share that is not in the
        other. `error`: the sum of the differences of their activations, relative to that of their activations in the
        TopK SAE; weak activations, which compete for the last of the k places, are most of both. `kl_plus`, `kl_minus`:
        KL(with TopK || with JumpReLU) of the steered model's next token at multipliers +1 and -1, in nats per token.

    Raises:
        ConfigError: The adapter does not exist, is disabled, is zero, or has no TopK SAE.
        DatasetError: The text has fewer than four rows, or lacks its columns.
        SAENotFoundError: The adapter is self-contained, and the whole SAE is not found.
    """
    name, layers = layers_of(model, adapter_name, "sae", "Converting")
    require_enabled(model)
    readings = [_Reading(layer, name) for layer in layers if _sae(layer, name).activation == "topk"]
    if not readings or not any(len(reading.indices) for reading in readings):
        raise ConfigError(f"Adapter {name!r} has no TopK SAE with a non-zero code: there is nothing to convert.")
    rows = [ids[: context_length(base_of(model))] for ids in neutral_rows(dataset, tokenizer, at_least=_HELD_OUT)]
    fitted, held_out = [ids for place, ids in enumerate(rows) if place % _HELD_OUT], rows[::_HELD_OUT]
    held_out = held_out[:_COMPARED]
    with evaluating(model):
        for ids in tqdm(fitted, desc="Fitting thresholds", unit="row"):
            for reading, h in zip(readings, _outputs(model, name, readings, ids), strict=True):
                reading.add(h)
            if sum(reading.size for reading in readings) > _MOST_VALUES:
                warnings.warn("Not all text is read, because the code has many features: prune it first.", stacklevel=2)
                break
        converted = [reading.converted() for reading in readings]
        found = _compared(model, name, readings, converted, held_out)
        _attach(readings, converted)
        config = cast(Any, model).peft_config[name]
        identities = {layer.index: _sae(layer, name).identity.to_dict() for layer in layers}
        config.sae_identity = [identities[index] for index in config.layer_indices()]
        config.self_contained, config.conversion = True, found
        if config.damage is not None:
            neutral = neutral_rows(None, tokenizer, at_most=_CALIBRATED)
            text = NeutralText(model, neutral, device_of(model), None, adapter_name=name)
            record_damage(model, name, layers, measured(text))
    return found


@dataclass
class _Reading:
    """What the features of a code do on text, at a layer with a TopK SAE.

    Attributes:
        layer: The layer.
        adapter_name: The adapter.
        indices: The features of the code, `(n,)`.
        values: Their pre-activations, `(tokens, n)` for each row of text, in float32.
        active: Whether they are among the k highest and above zero, shaped as `values`.
        lowest: The lowest activation of each token, `(tokens,)` for each row.
    """

    layer: YaPOLayer
    adapter_name: str
    values: list[Tensor] = field(default_factory=list)
    active: list[Tensor] = field(default_factory=list)
    lowest: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sae = _sae(self.layer, self.adapter_name)
        self.indices = self.layer.code(self.adapter_name).detach().nonzero().squeeze(-1).cpu()

    @property
    def size(self) -> int:
        """Number of pre-activations that are kept."""
        return sum(part.numel() for part in self.values)

    def add(self, h: Tensor) -> None:
        """Reads the layer's output, `(tokens, d_model)`."""
        weights, indices = self.sae.weights(h.device, h.dtype), self.indices.to(h.device)
        features = weights.encode(h)[0]
        self.values.append(weights.pre_activations(h)[:, indices].float().cpu())
        self.active.append((features[:, indices] > 0).cpu())
        self.lowest.append(features.masked_fill(features == 0, torch.inf).amin(-1).float().cpu())

    def converted(self) -> FrozenSAE:
        """The SAE with thresholds instead of k."""
        whole = self.sae.weights(torch.device("cpu"), self.sae.dtype)
        lowest = torch.cat(self.lowest)
        thresholds = lowest[lowest.isfinite()].mean().nan_to_num().repeat(whole.d_sae)
        values, active = torch.cat(self.values), torch.cat(self.active)
        parts = zip(values.split(_AT_ONCE, dim=1), active.split(_AT_ONCE, dim=1), strict=True)
        thresholds[self.indices] = torch.cat([fit_thresholds(*part) for part in parts])
        weights = replace(whole, activation="jumprelu", k=None, threshold=thresholds.to(whole.W_enc.dtype))
        identity = replace(self.sae.identity, architecture="jumprelu", content_hash=content_hash(weights))
        return FrozenSAE(weights, identity, self.sae.hook_name)


def fit_thresholds(values: Tensor, active: Tensor) -> Tensor:
    """Finds thresholds above which features are to be active, with the least sum of activations that are wrong.

    Args:
        values: Pre-activations, `(tokens, n)`.
        active: Where the features are active, `(tokens, n)`; never at or below zero.

    Returns:
        A threshold for each feature, `(n,)`: halfway between the lowest value that is active with it and the next one
        below, or the highest value if none should be.
    """
    ordered, order = values.relu().sort(dim=0, descending=True)
    gain = torch.where(active.gather(0, order), ordered, -ordered).cumsum(0)
    # A threshold cannot part equal values.
    is_last = torch.cat([ordered[1:] < ordered[:-1], ordered[-1:] > 0])
    best, place = gain.masked_fill(~is_last, -torch.inf).max(0)
    below = torch.cat([ordered[1:], torch.zeros_like(ordered[:1])])
    halfway = (ordered.gather(0, place[None])[0] + below.gather(0, place[None])[0]) / 2
    return torch.where(best > 0, halfway, ordered[0])


def _outputs(model: nn.Module, name: str, readings: list[_Reading], ids: list[int]) -> list[Tensor]:
    """The unsteered outputs of the layers, `(tokens, d_model)` each."""
    with steering(model, 0.0, name), block_outputs(reading.layer for reading in readings) as outputs:
        _logits(model, ids)
    return [outputs[reading.layer.index][0] for reading in readings]


def _compared(
    model: nn.Module, name: str, readings: list[_Reading], converted: list[FrozenSAE], rows: list[list[int]]
) -> dict[str, float]:
    """Compares both kinds of SAEs on text; see `convert_to_jumprelu`."""
    wrong, either, error, total = 0, 0, 0.0, 0.0
    divergences: dict[str, list[Tensor]] = {"kl_plus": [], "kl_minus": []}
    for ids in tqdm(rows, desc="Comparing", unit="row"):
        for reading, sae, h in zip(readings, converted, _outputs(model, name, readings, ids), strict=True):
            parts = (each.select(reading.indices, h.device, h.dtype) for each in (reading.sae, sae))
            before, after = (part.encode(h)[0].float() for part in parts)
            wrong += int(((before > 0) != (after > 0)).sum())
            either += int(((before > 0) | (after > 0)).sum())
            error, total = error + float((before - after).abs().sum()), total + float(before.sum())
        for metric, multiplier in (("kl_plus", 1.0), ("kl_minus", -1.0)):
            with steering(model, multiplier, name):
                both: list[Tensor] = []
                for saes in ([reading.sae for reading in readings], converted):
                    _attach(readings, saes)
                    try:
                        both.append(_logits(model, ids).float().log_softmax(-1))
                    finally:
                        _attach(readings, [reading.sae for reading in readings])
            kl = torch.nn.functional.kl_div(both[1], both[0], log_target=True, reduction="none").sum(-1)
            divergences[metric].append(kl.flatten())
    means = {metric: float(torch.cat(parts).mean().clamp(min=0)) for metric, parts in divergences.items()}
    return {"differ": wrong / max(either, 1), "error": error / total if total else 0.0, **means}


def _attach(readings: list[_Reading], saes: list[FrozenSAE]) -> None:
    for reading, sae in zip(readings, saes, strict=True):
        reading.layer.yapo_sae[reading.adapter_name] = sae


def _logits(model: nn.Module, ids: list[int]) -> Tensor:
    inputs = torch.tensor([ids], device=device_of(model))
    return model(input_ids=inputs, attention_mask=torch.ones_like(inputs), use_cache=False).logits


def _sae(layer: YaPOLayer, name: str) -> FrozenSAE:
    return cast(FrozenSAE, layer.yapo_sae[name])
