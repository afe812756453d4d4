"""Splits an adapter's effect at one layer into features."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..sae.weights import SAEWeights
from ..steering.formula import Multiplier, held_at, moved_features
from ..tuner import YaPOLayer
from ..tuner.positions import tokens_to_steer


@dataclass(frozen=True)
class Parts:
    """The features that an adapter steers at a layer; a dense vector counts as one feature that is always active.

    Attributes:
        layer: The steered layer.
        adapter_name: The adapter.
        features: Indices of the features, `(n,)` on the CPU; `[-1]` for a dense vector.
        entries: Their entries of the code, `(n,)` in float32; `[1]` for a dense vector.
        rows: Their directions in the residual stream, `(n, d_model)`: the decoder's rows, or the dense vector.
        sae: The encoder of these features; None for a dense vector.
    """

    layer: YaPOLayer
    adapter_name: str
    features: Tensor
    entries: Tensor
    rows: Tensor
    sae: SAEWeights | None

    @classmethod
    def of(cls, layer: YaPOLayer, adapter_name: str, device: torch.device, dtype: torch.dtype) -> Parts:
        """Returns all features that an adapter steers at a layer, those that move its output the furthest first."""
        code, sae = layer.code(adapter_name).detach().to(device), layer.yapo_sae[adapter_name]
        if sae is None:
            return cls(layer, adapter_name, torch.tensor([-1]), torch.ones(1, device=device), code[None], None)
        features = code.nonzero().squeeze(-1)
        rows = sae.decoder_rows(features, device, torch.float32)
        sizes = code[features].abs() * rows.norm(dim=1)
        if layer.clamps[adapter_name]:  # how far what is turned off moves is not known, so it comes first
            sizes = sizes.masked_fill(code[features] < 0, torch.inf)
        order = sizes.argsort(descending=True, stable=True)
        found = features[order]
        part = sae.select(found, device, dtype)
        return cls(layer, adapter_name, found.cpu(), code[found], rows[order], part)

    @property
    def values(self) -> Tensor:
        """The entries, or the values that features are held at, `(n,)`."""
        return self.entries.clamp(min=0) if self.clamps else self.entries

    @property
    def reach(self) -> Tensor:
        """How far each entry moves a token at most at multiplier 1, `(n,)`; NaN for features that are held."""
        reach = self.entries.abs() * self.rows.norm(dim=1)
        return torch.full_like(reach, torch.nan) if self.clamps else reach

    @property
    def clamps(self) -> bool:
        """Whether the features are held at the values of their entries."""
        return self.layer.clamps[self.adapter_name]

    def __len__(self) -> int:
        return len(self.features)

    def only(self, which: Tensor) -> Parts:
        """Returns some of the features, by their places here, `(m,)`."""
        sae = None if self.sae is None else self.sae.select(which)
        features = self.features[which.to(self.features.device)]
        return replace(self, features=features, entries=self.entries[which], rows=self.rows[which], sae=sae)

    def on(self, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the activations, `(batch, seq, n)` in float32, and the scale of the decoder's output.

        Args:
            h: The layer's output, `(batch, seq, d_model)`.
        """
        if self.sae is None:
            return torch.ones(*h.shape[:2], 1, device=h.device), None
        features, scale = self.sae.encode(h)
        return features.float(), scale

    def moved(self, h: Tensor, multiplier: Multiplier) -> Tensor:
        """Returns the change of each feature, `(batch, seq, n)`, including the scale of the decoder's output.

        It is zero at tokens that the adapter does not steer. Call this during the model's forward pass, which tells
        which tokens are steered.

        Args:
            h: The layer's output before steering, `(batch, seq, d_model)`.
            multiplier: One for all rows, or one per row, `(batch,)`.
        """
        on, scale = self.on(h)
        per_row = torch.as_tensor(multiplier, dtype=torch.float32, device=h.device).reshape(-1, 1, 1)
        wanted = per_row * (held_at(self.entries, on) if self.clamps else self.entries)
        moved = wanted.expand_as(on) if self.sae is None else moved_features(on, wanted)
        if scale is not None:
            moved = moved * scale
        mask = self.steered_tokens(h)
        return moved if mask is None else moved.masked_fill(~mask[..., None], 0)

    def shift(self, h: Tensor, multiplier: Multiplier) -> Tensor:
        """Returns the shift of the layer's output, `(batch, seq, d_model)`; call it like `moved`."""
        return (self.moved(h, multiplier) @ self.rows).to(h.dtype)

    def steered_tokens(self, h: Tensor) -> Tensor | None:
        """Returns the mask of the steered tokens, `(batch, seq)`; None for all. Call it like `moved`."""
        return tokens_to_steer(self.layer.positions[self.adapter_name], h, self.layer.call)
