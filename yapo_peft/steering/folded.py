"""A code at one multiplier, prepared so that each token only costs what can differ between tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..sae import FrozenSAE
from ..sae.weights import SAEWeights
from .formula import Multiplier, steering_shift, vector_of


@dataclass
class FoldedSteering:
    """Computes `steering_shift` for a fixed code and multiplier, with everything that tokens share computed once.

    Where `multiplier * code > 0`, `ReLU(f + multiplier * code) - f` is `multiplier * code` for any `f`: together, these
    entries are one vector. Only features that the code lowers have to be encoded. If multipliers differ by row, so do
    the signs, and all features that the code moves are encoded.

    Attributes:
        constant: The shift by the raised features, `(d_model,)`, or None if there are none.
        entries: The code of the encoded features, `(n,)`.
        sae: The autoencoder's part for these features.
        multiplier: Factor of the code, or None if it differs by row.
        code: The folded code, `(d_sae,)`.
        of_sae: Its autoencoder.
        clamps: Whether its entries are values to hold features at.
        checked_in: The `generate` in which the code was last compared with this one.
    """

    constant: Tensor | None
    entries: Tensor
    sae: SAEWeights
    multiplier: float | None
    code: Tensor
    of_sae: FrozenSAE
    clamps: bool
    checked_in: object | None

    @classmethod
    def of(
        cls,
        code: Tensor,
        sae: FrozenSAE,
        multiplier: Multiplier,
        like: Tensor,
        generation: object | None,
        clamps: bool = False,
    ) -> FoldedSteering:
        """Prepares a code, `(d_sae,)`, for activations of the device and dtype of `like`."""
        # Tensors made in inference mode could not be used outside of it, and autocast's rounding would stay in them.
        exact = torch.autocast(code.device.type, enabled=False)
        with torch.inference_mode(False), torch.no_grad(), exact:
            code, constant = code.detach().clone(), None
            if clamps or isinstance(multiplier, Tensor):
                read = code.nonzero().squeeze(-1)
            else:
                wanted = multiplier * code
                # NaN in a code is not below zero: it is in the constant, and spreads to all tokens.
                if (~(wanted < 0) & (wanted != 0)).any():
                    constant = vector_of(wanted, sae, sign=1).to(like.device, like.dtype)
                read = (wanted < 0).nonzero().squeeze(-1)
            part = sae.select(read, like.device, like.dtype)
            entries = code[read].to(like.device)
            return cls(constant, entries, part, _one(multiplier), code, sae, clamps, generation)

    def still_holds(
        self, code: Tensor, sae: FrozenSAE, multiplier: Multiplier, like: Tensor, generation: object | None
    ) -> bool:
        """Whether `of` would return the same. Compares codes once per `generate`, and in every call outside of it.

        Codes are compared by value: optimizers and wrappers change parameters without PyTorch's version counter.
        """
        dtype, device = self.sae.W_dec.dtype, self.sae.W_dec.device
        if (self.multiplier, self.of_sae, dtype, device) != (_one(multiplier), sae, like.dtype, like.device):
            return False
        if generation is not None and self.checked_in is generation:
            return True
        self.checked_in = generation
        return torch.equal(self.code, code)

    def shift(self, h: Tensor, multiplier: Multiplier, track: bool) -> tuple[Tensor, Tensor | None]:
        """As `steering_shift`, but returns which tokens moved instead of the shifts of the features.

        Args:
            h: Output of the layer, `(batch, seq, d_model)`.
            multiplier: Factor of the code: the folded one, or one per row, `(batch,)`.
            track: Whether to find out which tokens moved.

        Returns:
            The shift, shaped and typed as `h`, and which tokens have a moved feature, `(batch, seq)`, or None.
        """
        moved = torch.full(h.shape[:2], self.constant is not None, device=h.device) if track else None
        if not len(self.entries):
            return self._constant_for(h), moved
        shift, features = steering_shift(h, self.entries, self.sae, multiplier, self.clamps)
        if moved is not None:
            moved |= features.ne(0).any(dim=-1)
        return shift if self.constant is None else shift + self._constant_for(h), moved

    def _constant_for(self, h: Tensor) -> Tensor:
        if self.constant is None:
            return torch.zeros_like(h)
        _, scale = self.sae.normalize(h)
        return self.constant if scale is None else (self.constant * scale).to(h.dtype)


def _one(multiplier: Multiplier) -> float | None:
    return None if isinstance(multiplier, Tensor) else multiplier
