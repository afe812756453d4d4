"""A sparse autoencoder as adapters use it: frozen, shared, and on whichever device it is needed."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedSAEError
from .identity import SAEIdentity
from .weights import Activation, Normalization, SAEWeights


class FrozenSAE:
    """A sparse autoencoder shared by every adapter that uses it.

    It is not a module and has no parameters: it is never trained, saved or moved with a model. Copies for a device
    and a dtype are made when first asked for, and shared.

    Attributes:
        identity: What adapters record of it.
        hook_name: The activation it was trained on, in TransformerLens' names, or None where unknown.
    """

    def __init__(self, weights: SAEWeights, identity: SAEIdentity, hook_name: str | None = None) -> None:
        self.identity = identity
        self.hook_name = hook_name
        self._weights = weights
        self._copies: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    @property
    def _native(self) -> SAEWeights:
        """The weights as they were saved."""
        return self._weights

    @property
    def normalization(self) -> Normalization:
        """What happens to a token before the encoder."""
        return self._native.normalization

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it was saved in."""
        return self._native.W_dec.dtype

    @property
    def activation(self) -> Activation:
        """How pre-activations become features."""
        return self._native.activation

    def normalize(self, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `SAEWeights.normalize`."""
        return self._native.normalize(h)

    def weights(self, device: torch.device, dtype: torch.dtype) -> SAEWeights:
        """Returns the weights on a device, in a dtype."""
        moved = {name: self._copy(name, tensor, device, dtype) for name, tensor in self._native.tensors()}
        return dataclasses.replace(self._native, **moved)

    def decoder(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Returns the decoder, `(d_sae, d_in)`, on a device, in a dtype; the encoder need not be there."""
        return self._copy("W_dec", self._native.W_dec, device, dtype)

    def _copy(self, name: str, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        key = (name, device, dtype)
        if key not in self._copies:
            # A copy made in inference mode could not be used in training later.
            with torch.inference_mode(False), torch.no_grad():
                self._copies[key] = tensor.to(device, dtype)
        return self._copies[key]

    def decoder_rows(self, indices: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Returns the rows of the decoder for some features, `(n, d_in)`, on a device, in a dtype."""
        return self._native.W_dec[indices.to(self._native.W_dec.device)].to(device, dtype)

    def select(self, indices: Tensor, device: torch.device, dtype: torch.dtype) -> SAEWeights:
        """Returns the part for some features, `(n,)`, on a device, in a dtype; the others need not be there."""
        if self._native.activation == "topk" and len(indices):  # whose encoder needs them all
            return self.weights(device, dtype).select(indices.to(device))
        return self._native.select(indices.to(self._native.W_dec.device)).to(device, dtype)

    def under_another_name(self, identity: SAEIdentity, hook_name: str | None) -> FrozenSAE:
        """Returns the same SAE as another source names it; both share their memory."""
        renamed = FrozenSAE(self._native, identity, hook_name)
        renamed._copies = self._copies
        return renamed

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenSAE:
        return self

    def __repr__(self) -> str:
        return f"FrozenSAE({self.identity}, hook_name={self.hook_name!r})"

    @property
    def block(self) -> int | None:
        """The layer whose output this autoencoder reads, or None where it does not say.

        Raises:
            UnsupportedSAEError: It says, and it is something else than the output of a layer.
        """
        if not self.hook_name:
            return None
        match = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(post|pre)|(?:.*\.)?(?:layers|h)\.(\d+)", self.hook_name)
        if match is None:
            raise UnsupportedSAEError(
                f"The SAE reads {self.hook_name!r}, which is not the output of a layer. Steering needs an SAE of the "
                "residual stream, such as one trained on 'blocks.15.hook_resid_post'."
            )
        if match[3] is not None:
            return int(match[3])
        return int(match[1]) - (match[2] == "pre")
