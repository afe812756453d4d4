"""The tensors of a frozen SAE, and its encoder as a pure function of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Activation = Literal["relu", "jumprelu", "topk", "gated"]
Normalization = Literal["none", "layer_norm", "constant_norm_rescale"]


@dataclass(frozen=True)
class SAEWeights:
    """An SAE with a linear decoder, `Dec(f) = f @ W_dec + b_dec`, and features `f >= 0`.

    Steering needs the encoder and the decoder's rows. The decoder's bias cancels; only encoders that subtract it from
    their input use it.

    Attributes:
        W_enc: Encoder, `(d_in, d_sae)`.
        b_enc: Encoder bias, `(d_sae,)`. For "gated", the bias of the gate.
        W_dec: Decoder, `(d_sae, d_in)`.
        b_in: The bias subtracted from the encoder's input, `(d_in,)`, or None.
        activation: How pre-activations become features.
        threshold: For "jumprelu": features at or below it are zero, `(d_sae,)`.
        magnitude_scale: For "gated": `exp(r_mag)`, `(d_sae,)`.
        magnitude_bias: For "gated": `b_mag`, `(d_sae,)`.
        k: For "topk": number of active features per token.
        normalization: How the encoder's input is normalised; the decoder's output is scaled back.
        selected: For "topk", whose features compete: the features these weights are for, `(n,)`; None for all.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_in: Tensor | None = None
    activation: Activation = "relu"
    threshold: Tensor | None = None
    magnitude_scale: Tensor | None = None
    magnitude_bias: Tensor | None = None
    k: int | None = None
    normalization: Normalization = "none"
    selected: Tensor | None = None

    @property
    def d_in(self) -> int:
        """Width of the activations that the SAE reads."""
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_dec.shape[0]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the name and the value of each tensor, in a fixed order."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                yield field.name, value

    def to(self, device: torch.device, dtype: torch.dtype) -> SAEWeights:
        """Returns the weights on a device, in a dtype, without copying tensors that are there already."""
        moved = {n: t.to(device, dtype) if t.is_floating_point() else t.to(device) for n, t in self.tensors()}
        return dataclasses.replace(self, **moved)

    def clone(self) -> SAEWeights:
        """Returns a copy with its own memory."""
        return dataclasses.replace(self, **{name: value.clone() for name, value in self.tensors()})

    def select(self, indices: Tensor) -> SAEWeights:
        """Returns the weights of features `(n,)`; a TopK encoder, whose features compete, keeps all columns."""
        parts = {"W_dec": self.W_dec[indices]}
        if self.activation == "topk" and len(indices):
            return dataclasses.replace(
                self, **parts, selected=indices if self.selected is None else self.selected[indices]
            )
        columns = ("W_enc", "b_enc", "threshold", "magnitude_scale", "magnitude_bias")
        values = {name: value for name, value in self.tensors() if name in columns}
        parts |= {name: value[..., indices].contiguous() for name, value in values.items()}
        return dataclasses.replace(self, **parts)

    def pre_activations(self, h: Tensor) -> Tensor:
        """Computes what the activation function is applied to, `(..., d_sae)`; for "gated", that of the gate."""
        return self._product(self.normalize(h)[0]) + self.b_enc

    def encode(self, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """Computes the features of each token.

        Args:
            h: Activations, `(..., d_in)`, in the dtype of the weights.

        Returns:
            The features `f >= 0`, `(..., d_sae)`, and the scale of the decoder's output at each token, `(..., 1)`, or
            None if it is 1.
        """
        x, scale = self.normalize(h)
        product = self._product(x)
        pre = product + self.b_enc
        if self.activation == "relu":
            return pre.relu(), scale
        if self.activation == "jumprelu":
            assert self.threshold is not None
            return pre.relu() * (pre > self.threshold), scale
        if self.activation == "topk":
            assert self.k is not None
            top = pre.topk(self.k, dim=-1, sorted=False)
            features = torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
            return features if self.selected is None else features[..., self.selected], scale
        assert self.magnitude_scale is not None
        assert self.magnitude_bias is not None
        magnitude = (product * self.magnitude_scale + self.magnitude_bias).relu()
        return magnitude * (pre > 0), scale

    def _product(self, x: Tensor) -> Tensor:
        return (x if self.b_in is None else x - self.b_in) @ self.W_enc

    def normalize(self, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """Normalises the encoder's input as sae-lens does; the mean that layer_norm adds back cancels in steering.

        Returns:
            The input, `(..., d_in)`, and the scale of the decoder's output at each token, `(..., 1)`, or None if 1.
        """
        if self.normalization == "layer_norm":
            x = h - h.mean(dim=-1, keepdim=True)
            std = x.std(dim=-1, keepdim=True)
            return x / (std + 1e-5), std
        if self.normalization == "constant_norm_rescale":
            coefficient = self.d_in**0.5 / h.norm(dim=-1, keepdim=True)
            return h * coefficient, 1 / coefficient
        return h, None
