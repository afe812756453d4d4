"""Attributes an adapter's effect on preferences to its features."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
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
from ..scoring.scorer import SweepScorer
from ..tuner import steering
from ..tuner.adapters import adapter_of, require_enabled
from ..tuner.hooks import changed_outputs
from .checks import require_multiplier
from .parts import Parts
from .texts import device_and_dtype, require_length, tokenizer_of


@dataclass(frozen=True)
class Attribution:
    """The contribution of each feature to the mean margin of preference pairs, in nats.

    Attributes:
        features: A row per layer and feature: `layer`, `feature` (None for a dense vector), `value` (of the code),
            `reach` (how far the entry moves a token at most), `integrated` (its integrated gradient), and `left_out`
            (by how much the effect falls without it; NaN where that was not measured). Those that contribute the most
            come first.
        effect: How far the adapter moves the margin, all features together.
        rest: By how much the effect falls without all features that were not left out one by one.
        pairs: Number of pairs.
    """

    features: pd.DataFrame
    effect: float
    rest: float
    pairs: int

    @property
    def interaction(self) -> float:
        """The part of the effect due to interactions: the effect minus each `left_out` and `rest`."""
        return self.effect - float(np.nansum(self.features["left_out"])) - self.rest

    @property
    def integration_error(self) -> float:
        """The effect minus the sum of integrated gradients; more `steps` reduce it."""
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

    - Left out: the effect with all features, less the effect without one, measured by running the model. Half of the
      features are those that move activations the furthest, the others those of the largest integrated gradients.
    - Integrated gradients, of all features: the margin's derivative by a feature's entry, times the entry, averaged
      over multipliers from 0 to `multiplier` (midpoint rule). They add up to the effect, but for that rule's error.

    The model is not changed, and the layers below the lowest steered one run once per pair.

    Args:
        model: A `PeftModel` with a YaPO adapter; the vector of each layer of a dense adapter counts as one feature.
        dataset: Preference pairs in TRL's format, conversational or plain, with a `prompt`.
        tokenizer: The model's; found by the model's name if None.
        adapter_name: The adapter; the active one if None.
        multiplier: The multiplier.
        top: How many features to leave out one by one; a pass over the pairs each.
        steps: Multipliers to average over; a pass with gradients each.
        batch_size: Rows per forward pass.

    Raises:
        ConfigError: There is no such adapter, it does nothing, or an argument has a value that cannot work.
        DatasetError: The dataset is empty, or a pair lacks a column or an answer.

    Source: arXiv 1703.01365 (integrated gradients).
    """
    name, _, layers = adapter_of(model, adapter_name)
    at_least(1, top=top, steps=steps, batch_size=batch_size)
    require_multiplier(multiplier)
    require_enabled(model)
    if not any(bool(layer.code(name).any()) for layer in layers):
        raise ConfigError(f"All entries of adapter {name!r} are zero: it does nothing that could be attributed.")
    tokenizer = tokenizer_of(model, tokenizer)
    batches = Preference().batches(dataset, tokenizer, batch_size)
    require_length(model, max(batch["input_ids"].shape[1] for batch in batches), "A pair")
    device, dtype = device_and_dtype(model)
    with torch.inference_mode(False), evaluating(model):
        parts = [part for layer in layers if len(part := Parts.of(layer, name, device, dtype))]
        runs = _Runs(model, name, parts, [_moved(batch, device) for batch in batches])
        with tqdm(total=len(batches) * (4 + steps + top), desc="Attributing", unit="pass") as bar:
            (steered, unsteered), integrated = runs.integrated(multiplier, steps, bar)
            chosen = _chosen(parts, integrated, top)
            bar.total = len(batches) * (4 + steps + len(chosen))
            kept = [[column for index, column in chosen if index == own] for own in range(len(parts))]
            variants = [[_without(parts[index], column, multiplier)] for index, column in chosen]
            variants.append([_only(*both, multiplier) for both in zip(parts, kept, strict=True)])
            *without, alone = runs.margins([(multiplier, variant) for variant in variants], bar)
    left_out = [torch.full((len(part),), float("nan")) for part in parts]
    for (index, column), margins in zip(chosen, without, strict=True):
        left_out[index][column] = float((steered - margins).mean())
    tables = [_table(*columns, multiplier) for columns in zip(parts, integrated, left_out, strict=True)]
    table = pd.concat(tables, ignore_index=True)
    size = pd.DataFrame({"left_out": table["left_out"].abs().fillna(-1), "integrated": table["integrated"].abs()})
    order = size.sort_values(["left_out", "integrated"], ascending=False, kind="stable").index
    effect, rest = float((steered - unsteered).mean()), float((steered - alone).mean())
    return Attribution(table.loc[order].reset_index(drop=True), effect, rest, len(steered))


# Computes a layer's output from its outputs before and after steering.
_Change = tuple[Parts, Callable[[Tensor, Tensor], Tensor]]


class _Runs:
    """Margins of the same pairs, steered in many ways; a batch's lower layers run once for all of them."""

    def __init__(self, model: nn.Module, name: str, parts: list[Parts], batches: list[dict[str, Tensor]]) -> None:
        self._model, self._name, self._parts, self._batches = model, name, parts, batches
        with steering(model, 1.0, name):
            self._scorer = SweepScorer(model, 2)

    def margins(self, variants: list[tuple[float, list[_Change]]], bar: Any) -> Tensor:
        """The margin of each pair in each variant, `(variants, pairs)`, in the order of the batches."""
        return torch.cat([self._of_batch(batch, {}, variants, bar) for batch in self._batches], dim=1)

    def integrated(self, multiplier: float, steps: int, bar: Any) -> tuple[Tensor, list[Tensor]]:
        """Margins steered and unsteered, `(2, pairs)`, and the mean integrated gradients, `(n,)` for each block."""
        ends: list[Tensor] = []
        sums = [torch.zeros(len(part), device=part.entries.device) for part in self._parts]
        for batch in self._batches:
            kept: dict[str, Any] = {}
            # First, so that gradients are taken through what lies above the lowest steered layer alone.
            ends.append(self._of_batch(batch, kept, [(multiplier, []), (0.0, [])], bar))
            for step in range(steps):
                partial = multiplier * (step + 0.5) / steps
                with torch.enable_grad(), steering(self._model, partial, self._name), _traced(self._parts) as traced:
                    total = self._score(batch, kept).sum()
                outputs = [traced[part.layer.index] for part in self._parts]
                gradients = torch.autograd.grad(total, [steered for _, steered, _ in outputs])
                for part, own, (h, _, mask), gradient in zip(self._parts, sums, outputs, gradients, strict=True):
                    own += multiplier / steps * _by_entry(part, h, mask, gradient, partial)
                bar.update()
        margins = torch.cat(ends, dim=1)
        return margins, [(own / margins.shape[1]).cpu() for own in sums]

    @torch.no_grad()
    def _of_batch(
        self, batch: dict[str, Tensor], kept: dict[str, Any], variants: list[tuple[float, list[_Change]]], bar: Any
    ) -> Tensor:
        found: list[Tensor] = []
        for multiplier, changes in variants:
            with steering(self._model, multiplier, self._name), _changed(changes):
                found.append(self._score(batch, kept))
            bar.update()
        return torch.stack(found)

    def _score(self, batch: dict[str, Tensor], kept: dict[str, Any]) -> Tensor:
        return Preference().score(self._scorer, batch, kept)["margin"]


@contextmanager
def _changed(changes: Iterable[_Change]) -> Generator[None]:
    """Replaces the outputs of steered layers temporarily."""
    with changed_outputs((part.layer, change) for part, change in changes):
        yield


@contextmanager
def _traced(parts: list[Parts]) -> Generator[dict[int, tuple[Tensor, Tensor, Tensor | None]]]:
    """Traces gradients of the outputs of steered layers.

    Yields by layer index the last output before steering, the steered one, and which tokens are steered.
    """
    found: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}

    def trace(part: Parts) -> Callable[[Tensor, Tensor], Tensor]:
        def keep(h: Tensor, steered: Tensor) -> Tensor:
            if not steered.requires_grad:
                steered = steered.detach().requires_grad_()
            found[part.layer.index] = (h.detach(), steered, part.steered_tokens(h))
            return steered

        return keep

    with changed_outputs((part.layer, trace(part)) for part in parts):
        yield found


def _without(part: Parts, column: int, multiplier: float) -> _Change:
    """Leaves one feature out."""
    one = part.only(torch.tensor([column], device=part.entries.device))

    def change(h: Tensor, steered: Tensor) -> Tensor:
        return steered - (one.moved(h, multiplier) @ one.rows).to(steered.dtype)

    return part, change


def _only(part: Parts, columns: list[int], multiplier: float) -> _Change:
    """Leaves all features out but some."""
    some = part.only(torch.tensor(columns, dtype=torch.long, device=part.entries.device))

    def change(h: Tensor, steered: Tensor) -> Tensor:
        return h + (some.moved(h, multiplier) @ some.rows).to(steered.dtype) if columns else h

    return part, change


def _by_entry(part: Parts, h: Tensor, mask: Tensor | None, gradient: Tensor, multiplier: float) -> Tensor:
    """What the margin gains per unit of multiplier through each feature, `(n,)`, at some multiplier."""
    gradient = gradient.float() if mask is None else gradient.float() * mask[..., None]
    wanted = multiplier * part.entries
    if part.sae is None:
        return part.entries * (part.rows @ gradient.sum(dim=(0, 1)))
    scale = part.sae.normalize(h)[1]
    gradient = gradient if scale is None else gradient * scale
    result = torch.zeros_like(part.entries)
    raised = (wanted > 0).nonzero().squeeze(-1)
    result[raised] = part.rows[raised] @ gradient.sum(dim=(0, 1))
    lowered = part.only((wanted < 0).nonzero().squeeze(-1))
    if len(lowered):
        is_moving = lowered.on(h)[0] + multiplier * lowered.entries > 0
        result[wanted < 0] = ((gradient @ lowered.rows.T) * is_moving).sum(dim=(0, 1))
    return result * part.entries


def _chosen(parts: list[Parts], integrated: list[Tensor], top: int) -> list[tuple[int, int]]:
    """Which features to leave out, as the place of their part and theirs in it."""
    places = [(index, column) for index, part in enumerate(parts) for column in range(len(part))]
    reach = torch.cat([part.entries.abs().cpu() * part.rows.norm(dim=1).cpu() for part in parts])
    gained = torch.cat([own.abs() for own in integrated])
    order = list(dict.fromkeys([*reach.argsort(descending=True)[: (top + 1) // 2].tolist()]))
    order = list(dict.fromkeys([*order, *gained.argsort(descending=True).tolist()]))[:top]
    return [places[place] for place in order]


def _table(part: Parts, integrated: Tensor, left_out: Tensor, multiplier: float) -> pd.DataFrame:
    is_dense = part.sae is None
    norms = part.rows.norm(dim=1)
    columns = {
        "layer": part.layer.index,
        "feature": pd.array([None if is_dense else feature for feature in part.features.tolist()], dtype="Int64"),
        "value": (norms if is_dense else part.entries).tolist(),
        "reach": (abs(multiplier) * part.entries.abs() * norms).tolist(),
        "integrated": integrated.tolist(),
        "left_out": left_out.tolist(),
    }
    return pd.DataFrame(columns)


def _moved(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in batch.items()}
