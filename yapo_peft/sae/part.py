"""The part of an SAE that one code needs, as saved in a self-contained adapter."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import SAEMismatchError, SAENotFoundError
from .frozen import FrozenSAE
from .identity import SAEIdentity
from .weights import SAEWeights


class SAEPart(FrozenSAE):
    """Some features of an SAE, enough to steer with a code that is zero elsewhere.

    Everything else, such as training, another code or a TopK encoder that is not carried, loads the whole SAE on first
    use.

    Args:
        identity: The identity of the whole SAE.
        load: Loads the whole SAE.
    """

    def __init__(self, identity: SAEIdentity, load: Callable[[], FrozenSAE]) -> None:
        self.identity = identity
        self.hook_name = None
        self._load = load
        self._whole: FrozenSAE | None = None
        self._indices = torch.empty(0, dtype=torch.long)
        self._part: SAEWeights | None = None
        self._copies = {}

    def fill(self, indices: Tensor, part: SAEWeights) -> None:
        """Sets the weights of some features, `(n,)`, in ascending order."""
        self._indices, self._part, self._copies = indices.long().cpu(), part, {}

    @property
    def _native(self) -> SAEWeights:
        return self.whole()._native if self._part is None else self._part

    def weights(self, device: torch.device, dtype: torch.dtype) -> SAEWeights:
        """See `FrozenSAE.weights`; requires the whole SAE."""
        return self.whole().weights(device, dtype)

    def decoder(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """See `FrozenSAE.decoder`; requires the whole SAE."""
        return self.whole().decoder(device, dtype)

    def decoder_rows(self, indices: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """See `FrozenSAE.decoder_rows`."""
        places = self._places(indices)
        if places is None:
            return self.whole().decoder_rows(indices, device, dtype)
        return super().decoder_rows(places, device, dtype)

    def select(self, indices: Tensor, device: torch.device, dtype: torch.dtype) -> SAEWeights:
        """See `FrozenSAE.select`; features of a TopK encoder that is not carried require the whole SAE."""
        places, part = self._places(indices), self._part
        if places is None or part is None or (part.activation == "topk" and len(indices) and part.selected is None):
            return self.whole().select(indices, device, dtype)
        return super().select(places, device, dtype)

    def whole(self) -> FrozenSAE:
        """Returns the whole SAE.

        Raises:
            SAENotFoundError: The SAE cannot be found.
            SAEMismatchError: The SAE that was found is a different one.
        """
        if self._whole is None:
            try:
                found = self._load()
            except (SAENotFoundError, ImportError) as error:
                raise SAENotFoundError(
                    "This adapter contains only the part of its SAE that its own code needs. Training it, changing its "
                    "code, torch.compile, and a TopK SAE at multipliers of the other sign or by row (unless it was "
                    "converted with yapo_peft.methods.convert_to_jumprelu) need the whole SAE, which was not found: "
                    f"pass it to yapo_peft.register_sae, or to yapo combine with --sae-path. ({error})"
                ) from error
            if self.identity.architecture == "jumprelu" and found.identity.architecture == "topk":
                raise SAEMismatchError(
                    "This adapter's TopK SAE was converted to JumpReLU for its own code. Train or edit the adapter "
                    "from before the conversion, and convert it again."
                )
            found.identity.require_same(self.identity.to_dict(), "a self-contained adapter")
            self._whole = found
        return self._whole

    def _places(self, indices: Tensor) -> Tensor | None:
        """The places of features in this part; None if it lacks some."""
        if self._part is None:
            return None
        wanted = indices.cpu()
        places = torch.searchsorted(self._indices, wanted)
        if len(wanted) and (places.max() >= len(self._indices) or not torch.equal(self._indices[places], wanted)):
            return None
        return places
