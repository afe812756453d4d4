"""The part of an autoencoder that one code needs, as an adapter's file carries it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import SAENotFoundError
from .frozen import FrozenSAE
from .identity import SAEIdentity
from .weights import SAEWeights


class SAEPart(FrozenSAE):
    """Some features of an autoencoder: enough to steer with a code that moves no others.

    Whatever needs more (training, another code, a TopK encoder) loads the whole autoencoder, if it can be found.

    Args:
        identity: Of the whole autoencoder.
        load: Loads it.
    """

    def __init__(self, identity: SAEIdentity, load: Callable[[], FrozenSAE]) -> None:
        self.identity = identity
        self.hook_name = None
        self._load = load
        self._whole: FrozenSAE | None = None
        self._indices = torch.empty(0, dtype=torch.long)
        self._part: SAEWeights | None = None

    def fill(self, indices: Tensor, part: SAEWeights) -> None:
        """Takes what a file carries: the weights of some features, `(n,)`, ascending."""
        self._indices, self._part = indices.long().cpu(), part

    @property
    def _native(self) -> SAEWeights:
        return self.whole()._native if self._part is None else self._part

    def weights(self, device: torch.device, dtype: torch.dtype) -> SAEWeights:
        """As `FrozenSAE.weights`, of the whole autoencoder."""
        return self.whole().weights(device, dtype)

    def decoder(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """As `FrozenSAE.decoder`, of the whole autoencoder."""
        return self.whole().decoder(device, dtype)

    def decoder_rows(self, indices: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """As `FrozenSAE.decoder_rows`."""
        at = self._where(indices)
        if at is None or self._part is None:
            return self.whole().decoder_rows(indices, device, dtype)
        return self._part.W_dec[at].to(device, dtype)

    def select(self, indices: Tensor, device: torch.device, dtype: torch.dtype) -> SAEWeights:
        """As `FrozenSAE.select`; features that have to be read with a TopK encoder need all of it."""
        at = self._where(indices)
        if at is None or self._part is None or (self._part.activation == "topk" and len(indices)):
            return self.whole().select(indices, device, dtype)
        return self._part.select(at).to(device, dtype)

    def whole(self) -> FrozenSAE:
        """The whole autoencoder.

        Raises:
            SAENotFoundError: It cannot be found.
            SAEMismatchError: What is found is another one.
        """
        if self._whole is None:
            try:
                found = self._load()
            except (SAENotFoundError, ImportError) as error:
                raise SAENotFoundError(
                    "This adapter carries only what steering with its own code needs of its SAE. Training it, changing "
                    "its code, torch.compile, and a TopK SAE at multipliers of the other sign or by row need all of "
                    "it, "
                    f"and it was not found. {error}"
                ) from error
            found.identity.require_same(self.identity.to_dict(), "a self-contained adapter")
            self._whole = found
        return self._whole

    def _where(self, indices: Tensor) -> Tensor | None:
        """Where the features are in this part, or None if some are not."""
        wanted = indices.cpu()
        at = torch.searchsorted(self._indices, wanted)
        if len(wanted) and (at.max() >= len(self._indices) or not torch.equal(self._indices[at], wanted)):
            return None
        return at
