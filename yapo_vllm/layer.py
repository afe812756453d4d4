"""Steers the output of one layer for a batch of requests, each with its own adapters and multipliers."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from yapo_peft.errors import UnsupportedOperationError
from yapo_peft.sae import SAEWeights
from yapo_peft.sae.weights import Normalization
from yapo_peft.steering.formula import held_at, moved_features

from .served import LayerPart

# vLLM shows what its own loggers say.
logger = logging.getLogger("vllm.yapo")
_COLUMNS = ("b_enc", "threshold", "magnitude_scale", "magnitude_bias")
# Whether the SAE is gated, its normalization, and the encoder of a TopK SAE.
_Kind = tuple[bool, Normalization, str | None]


@dataclass(frozen=True)
class Capacity:
    """The sizes of preallocated tensors.

    Attributes:
        tokens: Number of tokens in one step.
        slots: Number of adapters.
        features: Number of features of a layer that one adapter may move.
    """

    tokens: int
    slots: int
    features: int


class Step:
    """The multipliers of the current step's tokens. Its tensors keep their addresses, for captured graphs.

    Attributes:
        multiplier: The multiplier of the adapter in each slot for each token, `(tokens, slots)`; 0 for none.
        on: Whether a token is steered at all, `(tokens, 1)`.
        layers: The layers that are steered.
        slots: The slots of the adapters in use.
    """

    def __init__(self, capacity: Capacity, device: torch.device) -> None:
        self.multiplier = torch.zeros(capacity.tokens, capacity.slots, device=device)
        self.on = torch.zeros(capacity.tokens, 1, dtype=torch.bool, device=device)
        self.layers: frozenset[int] = frozenset()
        self.slots: frozenset[int] = frozenset()
        self._count = 0

    def set(self, multiplier: Tensor, layers: Iterable[int], slots: Iterable[int]) -> None:
        """Sets the multipliers of the first tokens, `(n, slots)`; the others are not steered."""
        count = len(multiplier)
        self.multiplier[:count] = multiplier
        self.multiplier[count : self._count] = 0
        self.on[:count] = multiplier.ne(0).any(dim=1, keepdim=True)
        self.on[count : self._count] = False
        self._count, self.layers, self.slots = count, frozenset(layers), frozenset(slots)

    def clear(self) -> None:
        """Stops steering."""
        if self._count:
            self.set(self.multiplier[:0], (), ())


class _Vectors:
    """The shifts that do not depend on the token: for each slot, one for positive multipliers and one for negative."""

    def __init__(self, slots: int, d_model: int, device: torch.device) -> None:
        self.up = torch.zeros(slots, d_model, device=device)
        self.down = torch.zeros(slots, d_model, device=device)

    def put(self, slot: int, part: LayerPart) -> None:
        """Fills a slot."""
        self.up[slot], self.down[slot] = part.up, part.down

    def forget(self, slot: int) -> None:
        """Empties a slot."""
        self.up[slot] = self.down[slot] = 0

    def shift(self, multiplier: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the shift of tokens, `(n, d_model)`, at their multipliers, `(n, slots)`."""
        return (multiplier.clamp(min=0) @ self.up + multiplier.clamp(max=0) @ self.down).to(dtype)


class _Features:
    """The features of adapters whose SAEs share an encoder and a normalization, in columns reserved for each slot.

    Args:
        part: One of them; the encoder of a TopK SAE is held whole, once for all slots.
        capacity: The sizes of preallocated tensors.
        like: An empty tensor of the layer's dtype, on its device.
    """

    def __init__(self, part: LayerPart, capacity: Capacity, d_model: int, like: torch.Tensor) -> None:
        size = capacity.slots * capacity.features
        is_gated = part.sae is not None and part.sae.activation == "gated"
        names = ("b_enc", "magnitude_scale", "magnitude_bias") if is_gated else ("b_enc", "threshold")
        if part.encoder is not None and part.sae is not None:
            whole = {name: value.to(like) for name, value in _without_input_bias(part.sae).items()}
            selected = torch.zeros(size, dtype=torch.long, device=like.device)
            self._sae = replace(part.sae, **whole, b_in=None, W_dec=like.new_zeros(size, d_model), selected=selected)
        else:
            self._sae = SAEWeights(
                W_enc=like.new_zeros(d_model, size),
                W_dec=like.new_zeros(size, d_model),
                activation="gated" if is_gated else "jumprelu",
                normalization=part.normalization,
                **{name: like.new_zeros(size) for name in names},  # pyright: ignore[reportArgumentType]
            )
        # What has a column for each place of a slot.
        self._columns = ("selected",) if part.encoder is not None else ("W_enc", *names)
        self._values = torch.zeros(capacity.slots, capacity.features, device=like.device)
        # Whether a slot's values are what features are held at.
        self._clamps = torch.zeros(capacity.slots, 1, dtype=torch.bool, device=like.device)
        # With normalization, shifts that do not depend on the token are scaled too.
        self._vectors = _Vectors(capacity.slots, d_model, like.device)
        self._views: dict[int, SAEWeights] = {}

    def put(self, slot: int, part: LayerPart) -> None:
        """Fills a slot."""
        self._vectors.put(slot, part)
        here = self._places(slot, len(part.values) if part.sae is not None else 0)
        if part.sae is not None:
            selected = part.sae.selected
            new = _without_input_bias(part.sae) if selected is None else {"selected": selected}
            for name, value in new.items():
                own = getattr(self._sae, name)
                own[..., here] = value.to(own)
            self._sae.W_dec[here] = part.sae.W_dec.to(self._sae.W_dec)
            self._values[slot, : part.sae.d_sae] = part.values
        self._clamps[slot] = part.clamps
        columns = {name: getattr(self._sae, name)[..., here] for name in self._columns}
        self._views[slot] = replace(self._sae, **columns, W_dec=self._sae.W_dec[here])

    def forget(self, slot: int) -> None:
        """Empties a slot."""
        here = self._places(slot, self._values.shape[1])
        self._sae.W_dec[here] = 0
        for name in self._columns:
            getattr(self._sae, name)[..., here] = 0
        self._values[slot] = 0
        self._vectors.forget(slot)
        self._views.pop(slot, None)

    def shift(self, h: Tensor, multiplier: Tensor, slots: Iterable[int] | None) -> Tensor | None:
        """Returns the shift of tokens, `(n, d_model)`, at their multipliers, `(n, slots)`.

        Args:
            h: The tokens.
            multiplier: The multipliers.
            slots: The slots to read; None for all, including empty ones.

        Returns:
            The shift; None if no adapter in these slots has features.
        """
        competing = self._sae.selected is not None and any(slot in self._views for slot in slots or ())
        if slots is None or competing:  # the whole encoder runs once, whatever is read
            found = [(self._sae, slice(None))]
        else:
            found = [(self._views[slot], slice(slot, slot + 1)) for slot in slots if slot in self._views]
        if not found:
            return None
        shift, scale = torch.zeros_like(h), None
        for sae, here in found:
            features, scale = sae.encode(h)
            features = features.float().unflatten(1, (len(self._values[here]), -1))
            values = self._values[here, : features.shape[2]]
            held = torch.where(values != 0, held_at(values, features), 0)
            factor = multiplier[:, here, None]
            wanted = torch.where(self._clamps[here], factor * held, (factor * values).clamp(max=0))
            shift = shift + moved_features(features, wanted).flatten(1).to(h.dtype) @ sae.W_dec
        return shift if scale is None else (shift + self._vectors.shift(multiplier, h.dtype)) * scale

    def _places(self, slot: int, count: int) -> slice:
        start = slot * self._values.shape[1]
        return slice(start, start + count)


class LayerSteering:
    """Steers the output of one layer.

    Each adapter has a vector for each sign of its multiplier, and the features of its SAE that it moves. A step of the
    engine encodes and decodes these features once, whatever multipliers its requests have.

    Args:
        layer: Index of the layer.
        step: The current step.
        capacity: The sizes of preallocated tensors.
        d_model: Width of the activations.
        device: The layer's device.
        dtype: The dtype of its output.
    """

    def __init__(
        self, layer: int, step: Step, capacity: Capacity, d_model: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._layer, self._step, self._capacity, self._d_model = layer, step, capacity, d_model
        self._like = torch.empty(0, device=device, dtype=dtype)
        self._vectors = _Vectors(capacity.slots, d_model, device)
        self._features: dict[_Kind, _Features] = {}
        self._is_captured = False

    def prepare(self, part: LayerPart | None) -> None:
        """Allocates what `put` needs.

        Raises:
            UnsupportedOperationError: Captured graphs do not include its kind of SAE, or memory does not suffice.
        """
        kind = _kind_of(part)
        if part is None or kind is None or kind in self._features:
            return
        if self._is_captured:
            name = "this TopK SAE" if kind[2] else "a gated SAE" if kind[0] else "a ReLU or JumpReLU SAE"
            raise UnsupportedOperationError(
                f"The captured graphs do not include {name} with normalization {kind[1]!r}: start the server with an "
                "adapter of such an SAE in YAPO_ADAPTERS."
            )
        if part.encoder is not None and part.sae is not None:
            size = part.sae.W_enc.numel() * self._like.element_size() / 1e6
            logger.info("Layer %s holds the encoder of a TopK SAE: %.0f MB", self._layer, size)
        try:
            self._features[kind] = _Features(part, self._capacity, self._d_model, self._like)
        except (RuntimeError, MemoryError) as error:
            raise UnsupportedOperationError(
                f"Not enough memory for {self._capacity.slots} adapters of {self._capacity.features} features at layer "
                f"{self._layer}: lower YAPO_MAX_ADAPTERS or YAPO_MAX_FEATURES. {error}"
            ) from error

    def put(self, slot: int, part: LayerPart | None) -> None:
        """Replaces the contents of a slot by an adapter's part for this layer; None if it does not steer it."""
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
        """Steers a layer's output, `(n, d_model)`, in place: the sum of both tensors, if there are two.

        Tokens without steering keep their exact values.
        """
        # A captured graph is replayed with other multipliers and adapters.
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
            # One tensor holds the whole sum, so that adding them later does not round it again.
            residual.copy_(torch.where(on, steered, residual))
            hidden.masked_fill_(on, 0)


def _kind_of(part: LayerPart | None) -> _Kind | None:
    """The kind of SAE whose features a part shares; None if it needs neither features nor normalization."""
    if part is None or (part.sae is None and part.normalization == "none"):
        return None
    return part.sae is not None and part.sae.activation == "gated", part.normalization, part.encoder


def _without_input_bias(sae: SAEWeights) -> dict[str, Tensor]:
    """The encoder's tensors, with the input bias folded into the biases of the features."""
    tensors = {name: value for name, value in sae.tensors() if name in ("W_enc", *_COLUMNS)}
    if sae.b_in is not None:
        product = sae.b_in.float() @ sae.W_enc.float()
        tensors["b_enc"] = sae.b_enc.float() - product
        if sae.magnitude_bias is not None and sae.magnitude_scale is not None:
            tensors["magnitude_bias"] = sae.magnitude_bias.float() - product * sae.magnitude_scale.float()
    return tensors
