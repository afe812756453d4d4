"""The steering of one block for a batch of requests, each with its own adapters and multipliers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from yapo_peft.errors import UnsupportedOperationError
from yapo_peft.sae import SAEWeights
from yapo_peft.sae.weights import Normalization
from yapo_peft.steering.formula import moved_features

from .adapters import BlockPart

_COLUMNS = ("b_enc", "threshold", "magnitude_scale", "magnitude_bias")


@dataclass(frozen=True)
class Room:
    """How much there is to prepare for.

    Attributes:
        tokens: Tokens in one step.
        slots: Adapters.
        features: Features of a block that one adapter moves.
    """

    tokens: int
    slots: int
    features: int


class Step:
    """How strong each adapter steers each token of the current step; its tensors never change their place.

    Attributes:
        multiplier: Of each token, the multiplier of the adapter in each slot, `(tokens, slots)`; 0 for none.
        on: Whether a token is steered at all, `(tokens, 1)`.
        layers: The blocks at which anything is.
        slots: Those of the adapters in use.
    """

    def __init__(self, room: Room, device: torch.device) -> None:
        self.multiplier = torch.zeros(room.tokens, room.slots, device=device)
        self.on = torch.zeros(room.tokens, 1, dtype=torch.bool, device=device)
        self.layers: frozenset[int] = frozenset()
        self.slots: frozenset[int] = frozenset()
        self._count = 0

    def set(self, multiplier: Tensor, layers: Iterable[int], slots: Iterable[int]) -> None:
        """Takes the multipliers of the first tokens, `(n, slots)`; the others are not steered."""
        count = len(multiplier)
        self.multiplier[:count] = multiplier
        self.multiplier[count : self._count] = 0
        self.on[:count] = multiplier.ne(0).any(dim=1, keepdim=True)
        self.on[count : self._count] = False
        self._count, self.layers, self.slots = count, frozenset(layers), frozenset(slots)

    def clear(self) -> None:
        """Nothing is steered."""
        if self._count:
            self.set(self.multiplier[:0], (), ())


class _Vectors:
    """What adapters add without looking at a token: a vector for multipliers above zero, and one for those below."""

    def __init__(self, slots: int, d_model: int, device: torch.device) -> None:
        self.up = torch.zeros(slots, d_model, device=device)
        self.down = torch.zeros(slots, d_model, device=device)

    def put(self, slot: int, part: BlockPart) -> None:
        """Takes an adapter's."""
        self.up[slot], self.down[slot] = part.up, part.down

    def forget(self, slot: int) -> None:
        """Empties a slot."""
        self.up[slot] = self.down[slot] = 0

    def shift(self, multiplier: Tensor, dtype: torch.dtype) -> Tensor:
        """What they add to tokens, `(n, d_model)`, at the multipliers that these have, `(n, slots)`."""
        return (multiplier.clamp(min=0) @ self.up + multiplier.clamp(max=0) @ self.down).to(dtype)


class _Features:
    """The features that adapters lower, read in one way; each slot has as many columns as there is room for."""

    def __init__(
        self, is_gated: bool, normalization: Normalization, room: Room, d_model: int, like: torch.Tensor
    ) -> None:
        size = room.slots * room.features
        names = ("b_enc", "magnitude_scale", "magnitude_bias") if is_gated else ("b_enc", "threshold")
        self._sae = SAEWeights(
            W_enc=like.new_zeros(d_model, size),
            W_dec=like.new_zeros(size, d_model),
            activation="gated" if is_gated else "jumprelu",
            normalization=normalization,
            **{name: like.new_zeros(size) for name in names},  # pyright: ignore[reportArgumentType]
        )
        self._values = torch.zeros(room.slots, room.features, device=like.device)
        # Where tokens are normalised, what is raised is scaled with them.
        self._vectors = _Vectors(room.slots, d_model, like.device)
        self._views: dict[int, SAEWeights] = {}

    def put(self, slot: int, part: BlockPart) -> None:
        """Takes an adapter's."""
        self._vectors.put(slot, part)
        here = self._columns(slot, len(part.values) if part.sae is not None else 0)
        if part.sae is not None:
            for name, value in _without_input_bias(part.sae).items():
                own = getattr(self._sae, name)
                own[..., here] = value.to(own)
            self._sae.W_dec[here] = part.sae.W_dec.to(self._sae.W_dec)
            self._values[slot, : part.sae.d_sae] = part.values
        columns = {name: value[..., here] for name, value in self._sae.tensors() if name != "W_dec"}
        self._views[slot] = dataclasses.replace(self._sae, **columns, W_dec=self._sae.W_dec[here])

    def forget(self, slot: int) -> None:
        """Empties a slot."""
        here = self._columns(slot, self._values.shape[1])
        for name, value in self._sae.tensors():
            if name == "W_dec":
                value[here] = 0
            else:
                value[..., here] = 0
        self._values[slot] = 0
        self._vectors.forget(slot)
        self._views.pop(slot, None)

    def shift(self, h: Tensor, multiplier: Tensor, slots: Iterable[int] | None) -> Tensor | None:
        """What they add to tokens, `(n, d_model)`, at the multipliers that these have, `(n, slots)`.

        Args:
            h: The tokens.
            multiplier: The multipliers.
            slots: Whose columns to read; None for all, also of slots that are empty now.

        Returns:
            The shift; None if no adapter in these slots has features here.
        """
        if slots is None:
            found = [(self._sae, (multiplier[:, :, None] * self._values).flatten(1))]
        else:
            views = {slot: self._views[slot] for slot in slots if slot in self._views}
            found = [(sae, multiplier[:, slot, None] * self._values[slot, : sae.d_sae]) for slot, sae in views.items()]
        if not found:
            return None
        shift, scale = torch.zeros_like(h), None
        for sae, wanted in found:
            features, scale = sae.encode(h)
            shift = shift + moved_features(features.float(), wanted.clamp(max=0)).to(h.dtype) @ sae.W_dec
        return shift if scale is None else (shift + self._vectors.shift(multiplier, h.dtype)) * scale

    def _columns(self, slot: int, count: int) -> slice:
        start = slot * self._values.shape[1]
        return slice(start, start + count)


class BlockSteering:
    """Steers the output of one block, at the price of what can differ between tokens.

    For each adapter there is a vector for each sign of its multiplier, and the features of its SAE: a step of the
    engine
    costs an encoder and a decoder of these, whatever multipliers its requests have.

    Args:
        layer: Index of the block.
        step: The current step.
        room: How much to prepare for.
        d_model: Width of the activations.
        device: Where the block is.
        dtype: Of its output.
    """

    def __init__(
        self, layer: int, step: Step, room: Room, d_model: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._layer, self._step, self._room, self._d_model = layer, step, room, d_model
        self._like = torch.empty(0, device=device, dtype=dtype)
        self._vectors = _Vectors(room.slots, d_model, device)
        self._features: dict[tuple[bool, Normalization], _Features] = {}
        self._is_captured = False

    def prepare(self, part: BlockPart | None) -> None:
        """Makes sure that `put` has what it needs.

        Raises:
            UnsupportedOperationError: Captured graphs do not read its kind of SAE, or there is no memory for it.
        """
        kind = _kind_of(part)
        if kind is None or kind in self._features:
            return
        if self._is_captured:
            raise UnsupportedOperationError(
                f"The captured graphs read no {'gated' if kind[0] else 'ReLU or JumpReLU'} SAE of normalization "
                f"{kind[1]!r}: name an adapter of such an SAE in YAPO_ADAPTERS, so that it is there from the start."
            )
        try:
            self._features[kind] = _Features(*kind, self._room, self._d_model, self._like)
        except (RuntimeError, MemoryError) as error:
            raise UnsupportedOperationError(
                f"There is no memory for {self._room.slots} adapters of {self._room.features} features at block "
                f"{self._layer}: lower YAPO_MAX_ADAPTERS or YAPO_MAX_FEATURES. {error}"
            ) from error

    def put(self, slot: int, part: BlockPart | None) -> None:
        """Takes what a slot's adapter does at this block, in the place of what is there; None for nothing."""
        self.prepare(part)
        self._vectors.forget(slot)
        for features in self._features.values():
            features.forget(slot)
        if part is None:
            return
        kind = _kind_of(part)
        if kind is not None:
            self._features[kind].put(slot, part)
        if part.normalization == "none":
            self._vectors.put(slot, part)

    def __call__(self, hidden: Tensor, residual: Tensor | None) -> None:
        """Steers in place what a block puts out, `(n, d_model)`: the sum of both, where there are two.

        Tokens without steering stay as they are, bit for bit.
        """
        # What is captured runs again when the step, and what is in the slots, has changed.
        is_captured = hidden.is_cuda and torch.cuda.is_current_stream_capturing()
        self._is_captured |= is_captured
        if not is_captured and self._layer not in self._step.layers:
            return
        count = hidden.shape[0]
        multiplier, on = self._step.multiplier[:count], self._step.on[:count]
        h = hidden if residual is None else hidden + residual
        shift = self._vectors.shift(multiplier, h.dtype)
        for features in self._features.values():
            more = features.shift(h, multiplier, None if is_captured else self._step.slots)
            shift = shift if more is None else shift + more
        steered = h + shift
        if residual is None:
            hidden.copy_(torch.where(on, steered, hidden))
        else:
            # The sum is whole in one of them, so that it is not rounded again when it is formed.
            residual.copy_(torch.where(on, steered, residual))
            hidden.masked_fill_(on, 0)


def _kind_of(part: BlockPart | None) -> tuple[bool, Normalization] | None:
    """How the features of a part are read; None where none are, and tokens are not normalised either."""
    if part is None or (part.sae is None and part.normalization == "none"):
        return None
    return part.sae is not None and part.sae.activation == "gated", part.normalization


def _without_input_bias(sae: SAEWeights) -> dict[str, Tensor]:
    """The encoder's tensors; what it subtracts from every token is a constant of each feature."""
    tensors = {name: value for name, value in sae.tensors() if name in ("W_enc", *_COLUMNS)}
    if sae.b_in is not None:
        product = sae.b_in.float() @ sae.W_enc.float()
        tensors["b_enc"] = sae.b_enc.float() - product
        if sae.magnitude_bias is not None and sae.magnitude_scale is not None:
            tensors["magnitude_bias"] = sae.magnitude_bias.float() - product * sae.magnitude_scale.float()
    return tensors
