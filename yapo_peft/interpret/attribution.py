"""Attributes an adapter's effect on preferences to its features."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .._utils import at_least, evaluating
from ..errors import ConfigError
from ..evaluation.preference import Preference
from ..scoring.checks import longest, require_length
from ..scoring.scorer import SweepScorer
from ..steering.formula import held_at
from ..tuner import YaPOLayer, steering
from ..tuner.adapters import adapter_of, require_enabled
from ..tuner.blocks import base_of
from ..tuner.hooks import changed_outputs
from .checks import require_multiplier
from .parts import Parts
from .texts import device_and_dtype, tokenizer_of


@dataclass(frozen=True)
class Attribution:
    """The contribution of each feature to the mean margin of preference pairs, in nats.

    Attributes:
        features: A row per layer and feature, the largest contributions first: `layer`, `feature` (None for a dense
            vector), `value` (the code's entry), `reach` (the maximum distance by which it moves a token; NaN if it is
            held at a value), `integrated` (its integrated gradient), and `left_out` (the decrease of the effect without
            it; NaN if not measured).
        effect: The change of the margin by the whole adapter.
        rest: The decrease of the effect without all features whose `left_out` was not measured.
        pairs: Number of pairs.
    """

    features: pd.DataFrame
    effect: float
    rest: float
    pairs: int

    @property
    def interaction(self) -> float:
        """The part of the effect due to interactions: `effect` minus the sum of `left_out` and `rest`."""
        return self.effect - float(np.nansum(self.features["left_out"])) - self.rest

    @property
    def integration_error(self) -> float:
        """The effect minus the sum of the integrated gradients; more `steps` reduce it."""
        return self.effect - float(np.sum(self.features["integrated"]))


def attribute(
    model: nn.Module,
    dataset: Iterable[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    adapter_name: str | None = None,
    multiplier: float = 1.0,
    top: int = 16,
    steps: int = 16,
    batch_size: int = 16,
) -> Attribution:
    """Attributes an adapter's effect on the preference margin to its features, in two ways.

    - Ablation: the decrease of the effect without one feature, measured by running the model. Half of the ablated
      features are those that move activations the furthest, the others those with the largest integrated gradients.
    - Integrated gradients, for all features: the margin's derivative with respect to an entry, times the entry,
      averaged over multipliers from 0 to `multiplier` (midpoint rule). Their sum is the effect, up to the error of
      that rule.

    The layers below the lowest steered one run once per pair.

    Args:
        model: A `PeftModel` with a YaPO adapter; left unchanged. Each vector of a dense adapter counts as one feature.
        dataset: Preference pairs in TRL's format, conversational or plain, with a `prompt`.
        tokenizer: The model's tokenizer; loaded by the model's name if None.
        adapter_name: The adapter; the active one if None.
        multiplier: The multiplier.
        top: Number of features to ablate, with a pass over the pairs for each.
        steps: Number of multipliers to average over, with a forward and backward pass for each.
        batch_size: Rows per forward pass.

    Raises:
        ConfigError: The adapter does not exist or has a zero code, or an argument is invalid.
        DatasetError: The dataset is empty, or a pair has no answer or lacks a column.

    Source: arXiv 1703.01365 (integrated gradients).
    """
    name, _, layers = adapter_of(model, adapter_name)
    at_least(1, top=top, steps=steps, batch_size=batch_size)
    require_multiplier(multiplier)
    require_enabled(model)
    if not any(bool(layer.code(name).any()) for layer in layers):
        raise ConfigError(f"All entries of adapter {name!r} are zero: train it, or name another adapter.")
    tokenizer = tokenizer_of(model, tokenizer)
    batches = Preference().batches(dataset, tokenizer, batch_size)
    require_length(base_of(model), longest(batches), "A pair")
    device, dtype = device_and_dtype(model)
    with torch.inference_mode(False), evaluating(model):
        parts = [part for layer in layers if len(part := Parts.of(layer, name, device, dtype))]
        batches = [{key: value.to(device) for key, value in batch.items()} for batch in batches]
        runs = _Runs(model, name, parts, batches)
        with tqdm(total=len(batches) * (4 + steps + top), desc="Attributing", unit="pass") as bar:
            (steered, unsteered), integrated = runs.integrated(multiplier, steps, bar)
            ablated = _to_ablate(parts, integrated, top)
            bar.total = len(batches) * (4 + steps + len(ablated))
            variants = [[_without(parts[index], column, multiplier)] for index, column in ablated]
            kept = [[column for place, column in ablated if place == index] for index in range(len(parts))]
            variants.append([_only(part, columns, multiplier) for part, columns in zip(parts, kept, strict=True)])
            *without, alone = runs.margins([(multiplier, variant) for variant in variants], bar)
    left_out = [torch.full((len(part),), float("nan")) for part in parts]
    for (index, column), margins in zip(ablated, without, strict=True):
        left_out[index][column] = float((steered - margins).mean())
    tables = [_table(*columns, multiplier) for columns in zip(parts, integrated, left_out, strict=True)]
    table = pd.concat(tables, ignore_index=True)
    size = pd.DataFrame({"left_out": table["left_out"].abs().fillna(-1), "integrated": table["integrated"].abs()})
    order = size.sort_values(["left_out", "integrated"], ascending=False, kind="stable").index
    effect, rest = float((steered - unsteered).mean()), float((steered - alone).mean())
    return Attribution(table.loc[order].reset_index(drop=True), effect, rest, len(steered))


# A layer, and a function of its outputs before and after steering that returns the one to use instead.
_Change = tuple[YaPOLayer, Callable[[Tensor, Tensor], Tensor]]


class _Runs:
    """Margins of the same pairs under different steering; the lower layers run once per batch in `integrated`."""

    def __init__(self, model: nn.Module, name: str, parts: list[Parts], batches: list[dict[str, Tensor]]) -> None:
        self._model, self._name, self._parts, self._batches = model, name, parts, batches
        with steering(model, 1.0, name):
            self._scorer = SweepScorer(model, 2)

    def margins(self, variants: list[tuple[float, list[_Change]]], bar: Any) -> Tensor:
        """The margin of each pair under each variant, `(variants, pairs)`."""
        return torch.cat([self._of_batch(batch, {}, variants, bar) for batch in self._batches], dim=1)

    def integrated(self, multiplier: float, steps: int, bar: Any) -> tuple[Tensor, list[Tensor]]:
        """The steered and unsteered margins, `(2, pairs)`, and the mean integrated gradients of each layer, `(n,)`."""
        ends: list[Tensor] = []
        sums = [torch.zeros(len(part), device=part.entries.device) for part in self._parts]
        for batch in self._batches:
            kept: dict[str, Any] = {}
            # First, so that the lower layers are cached and gradients only pass through the upper ones.
            ends.append(self._of_batch(batch, kept, [(multiplier, []), (0.0, [])], bar))
            for step in range(steps):
                midpoint = multiplier * (step + 0.5) / steps
                with torch.enable_grad(), steering(self._model, midpoint, self._name), _traced(self._parts) as traced:
                    total = self._score(batch, kept).sum()
                outputs = [traced[part.layer.index] for part in self._parts]
                gradients = torch.autograd.grad(total, [steered for _, steered, _ in outputs])
                for part, own, (h, _, mask), gradient in zip(self._parts, sums, outputs, gradients, strict=True):
                    own += multiplier / steps * _per_multiplier(part, h, mask, gradient, midpoint)
                bar.update()
        margins = torch.cat(ends, dim=1)
        return margins, [(own / margins.shape[1]).cpu() for own in sums]

    @torch.no_grad()
    def _of_batch(
        self, batch: dict[str, Tensor], kept: dict[str, Any], variants: list[tuple[float, list[_Change]]], bar: Any
    ) -> Tensor:
        found: list[Tensor] = []
        for multiplier, changes in variants:
            with steering(self._model, multiplier, self._name), changed_outputs(changes):
                found.append(self._score(batch, kept))
            bar.update()
        return torch.stack(found)

    def _score(self, batch: dict[str, Tensor], kept: dict[str, Any]) -> Tensor:
        return Preference().score(self._scorer, batch, kept)["margin"]


@contextmanager
def _traced(parts: list[Parts]) -> Generator[dict[int, tuple[Tensor, Tensor, Tensor | None]]]:
    """Tracks gradients of the outputs of steered layers.

    Yields, by layer index, the last output before steering, the steered one, and the mask of the steered tokens.
    """
    found: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}

    def trace(part: Parts, h: Tensor, steered: Tensor) -> Tensor:
        if not steered.requires_grad:
            steered = steered.detach().requires_grad_()
        found[part.layer.index] = (h.detach(), steered, part.steered_tokens(h))
        return steered

    with changed_outputs((part.layer, partial(trace, part)) for part in parts):
        yield found


def _without(part: Parts, column: int, multiplier: float) -> _Change:
    """Ablates one feature."""
    one = part.only(torch.tensor([column], device=part.entries.device))
    return part.layer, lambda h, steered: steered - one.shift(h, multiplier)


def _only(part: Parts, columns: list[int], multiplier: float) -> _Change:
    """Ablates all features but the given ones."""
    some = part.only(torch.tensor(columns, dtype=torch.long, device=part.entries.device))
    return part.layer, lambda h, steered: h + some.shift(h, multiplier) if columns else h


def _per_multiplier(part: Parts, h: Tensor, mask: Tensor | None, gradient: Tensor, multiplier: float) -> Tensor:
    """The derivative of the margin with respect to the multiplier through each feature, `(n,)`."""
    gradient = gradient.float() if mask is None else gradient.float() * mask[..., None]
    wanted = multiplier * part.entries
    if part.sae is None:
        return part.entries * (part.rows @ gradient.sum(dim=(0, 1)))
    scale = part.sae.normalize(h)[1]
    gradient = gradient if scale is None else gradient * scale
    if part.clamps:
        on = part.on(h)[0]
        rate = held_at(part.entries, on)
        return ((gradient @ part.rows.T) * (on + multiplier * rate > 0) * rate).sum(dim=(0, 1))
    result = torch.zeros_like(part.entries)
    raised = (wanted > 0).nonzero().squeeze(-1)
    result[raised] = part.rows[raised] @ gradient.sum(dim=(0, 1))
    lowered = part.only((wanted < 0).nonzero().squeeze(-1))
    if len(lowered):
        is_active = lowered.on(h)[0] + multiplier * lowered.entries > 0
        result[wanted < 0] = ((gradient @ lowered.rows.T) * is_active).sum(dim=(0, 1))
    return result * part.entries


def _to_ablate(parts: list[Parts], integrated: list[Tensor], top: int) -> list[tuple[int, int]]:
    """The features to ablate, as the index of their part and their place in it."""
    places = [(index, column) for index, part in enumerate(parts) for column in range(len(part))]
    gradients = torch.cat(integrated).abs()
    reach = torch.cat([part.reach.cpu() for part in parts]).nan_to_num(
        -1
    )  # of which there is none if features are held
    order = torch.cat([reach.argsort(descending=True)[: (top + 1) // 2], gradients.argsort(descending=True)])
    return [places[place] for place in dict.fromkeys(order.tolist())][:top]


def _table(part: Parts, integrated: Tensor, left_out: Tensor, multiplier: float) -> pd.DataFrame:
    is_dense = part.sae is None
    norms = part.rows.norm(dim=1)
    columns = {
        "layer": part.layer.index,
        "feature": pd.array([None if is_dense else feature for feature in part.features.tolist()], dtype="Int64"),
        "value": (norms if is_dense else part.values).tolist(),
        "reach": (abs(multiplier) * part.reach).tolist(),
        "integrated": integrated.tolist(),
        "left_out": left_out.tolist(),
    }
    return pd.DataFrame(columns)
