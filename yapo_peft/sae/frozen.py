"""The SAE that adapters share: frozen, with copies on the devices that need it."""

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
    """A frozen SAE, shared by all adapters that use it.

    It is not a module, so it is never trained, saved or moved with a model. Copies on other devices or in other dtypes
    are created on first use, and shared too.

    Attributes:
        identity: The identity that adapters record.
        hook_name: TransformerLens' name of the activation it was trained on; None if unknown.
    """

    def __init__(self, weights: SAEWeights, identity: SAEIdentity, hook_name: str | None = None) -> None:
        self.identity = identity
        self.hook_name = hook_name
        self._weights = weights
        self._copies: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    @property
    def _native(self) -> SAEWeights:
        """The weights on their original device, in their original dtype."""
        return self._weights

    @property
    def normalization(self) -> Normalization:
        """How the encoder's input is normalised."""
        return self._native.normalization

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it was saved in."""
        return self._native.W_dec.dtype

    @property
    def activation(self) -> Activation:
        """How pre-activations become features."""
        return self._native.activation

    def normalize(self, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `SAEWeights.normalize`."""
        return self._native.normalize(h)

    def weights(self, device: torch.device, dtype: torch.dtype) -> SAEWeights:
        """Returns the weights on a device, in a dtype."""
        return self._moved(device, dtype)

    def _moved(self, device: torch.device, dtype: torch.dtype) -> SAEWeights:
        moved = {name: self._copy(name, tensor, device, dtype) for name, tensor in self._native.tensors()}
        return dataclasses.replace(self._native, **moved)

    def decoder(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Returns the decoder, `(d_sae, d_in)`, on a device, in a dtype; does not move the encoder."""
        return self._copy("W_dec", self._native.W_dec, device, dtype)

    def _copy(self, name: str, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        key = (name, device, dtype)
        if key not in self._copies:
            # Copies made in inference mode could not be used in training.
            with torch.inference_mode(False), torch.no_grad():
                self._copies[key] = tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
        return self._copies[key]

    def decoder_rows(self, indices: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Returns the decoder rows of features `(n,)`, as `(n, d_in)`, on a device, in a dtype."""
        return self._native.W_dec[indices.to(self._native.W_dec.device)].to(device, dtype)

    def select(self, indices: Tensor, device: torch.device, dtype: torch.dtype) -> SAEWeights:
        """Returns the weights of features `(n,)`, on a device, in a dtype; does not move the others if possible."""
        if self._native.activation == "topk" and len(indices):  # its encoder needs all features
            return self._moved(device, dtype).select(indices.to(device))
        return self._native.select(indices.to(self._native.W_dec.device)).to(device, dtype)

    def renamed(self, identity: SAEIdentity, hook_name: str | None) -> FrozenSAE:
        """Returns the same SAE under the name of another source, with shared memory."""
        renamed = FrozenSAE(self._native, identity, hook_name)
        renamed._copies = self._copies
        return renamed

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenSAE:
        return self

    def __repr__(self) -> str:
        return f"FrozenSAE({self.identity}, hook_name={self.hook_name!r})"

    @property
    def block(self) -> int | None:
        """The layer whose output the SAE reads; None if unknown.

        Raises:
            UnsupportedSAEError: The SAE reads another activation.
        """
        return layer_read(self.hook_name)


def layer_read(hook_name: str | None) -> int | None:
    """The layer whose output an SAE with this hook name reads; None if it has none. Raises as `FrozenSAE.block`."""
    if not hook_name:
        return None
    match = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(post|pre)|(?:.*\.)?(?:layers|h)\.(\d+)", hook_name)
    if match is None:
        raise UnsupportedSAEError(
            f"The SAE reads {hook_name!r}, which is not the output of a layer: use an SAE of the residual stream, such "
            "as one trained on 'blocks.15.hook_resid_post'."
        )
    if match[3] is not None:
        return int(match[3])
    return int(match[1]) - (match[2] == "pre")
