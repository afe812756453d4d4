"""Identifies the SAE that an adapter was trained on."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from .._utils import hash_tensors
from ..errors import AdapterFileError, SAEMismatchError
from .weights import SAEWeights

# More than the widest published SAE has, the 16 million features of arXiv 2406.04093, or any model's width: what a
# damaged file asks for beyond these is not allocated.
_MOST = {"d_in": 1 << 20, "d_sae": 1 << 25}


@dataclass(frozen=True)
class SAEIdentity:
    """The identity of an SAE, as recorded in an adapter's config.

    Attributes:
        release: Name of the release in sae-lens' directory; None for a local SAE.
        sae_id: Name within the release; None for a local SAE.
        d_in: Width of the activations.
        d_sae: Number of features.
        architecture: sae-lens' name of the architecture, such as "jumprelu".
        content_hash: SHA-256 over the weights and the settings that change the encoder, in hexadecimal.
    """

    release: str | None
    sae_id: str | None
    d_in: int
    d_sae: int
    architecture: str
    content_hash: str

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, recorded: object) -> SAEIdentity:
        """Restores an identity from `to_dict`; ignores fields of later versions.

        Raises:
            AdapterFileError: A field is missing, has the wrong type, or is out of range.
        """
        given: dict[str, Any] = recorded if isinstance(recorded, dict) else {}
        sizes = {name: given.get(name) for name in _MOST}
        is_valid = (
            all(type(size) is int and 0 < size <= _MOST[name] for name, size in sizes.items())
            and all(isinstance(given.get(name), str | None) for name in ("release", "sae_id"))
            and isinstance(given.get("architecture"), str)
            and is_hash(given.get("content_hash"))
        )
        if not is_valid:
            raise AdapterFileError(
                f"sae_identity in adapter_config.json is {recorded!r:.300}: d_in and d_sae must be whole numbers up to "
                f"{_MOST['d_in']} and {_MOST['d_sae']}, architecture a string, and content_hash 64 hexadecimal digits. "
                "Save or download the adapter again."
            )
        return cls(**{field.name: given.get(field.name) for field in dataclasses.fields(cls)})  # pyright: ignore

    def require_same(self, recorded: dict[str, Any], where: str) -> None:
        """Checks that this is the SAE that an adapter recorded, by its content; the source may differ.

        Args:
            recorded: The result of `to_dict` when the adapter was trained.
            where: The layer, for the message.

        Raises:
            SAEMismatchError: The content differs; the message lists the fields that differ.
        """
        if recorded.get("content_hash") == self.content_hash:
            return
        here = self.to_dict()
        differing = [
            f"{name}: {recorded.get(name)!r} in training, {here[name]!r} now"
            for name in here
            if recorded.get(name) != here[name]
        ]
        raise SAEMismatchError(
            f"The SAE for {where} is not the one that the adapter was trained on ({'; '.join(differing)}): a code is "
            "meaningless with the features of another SAE, so set sae_release and sae_id, or sae_path, to the original."
        )


def is_hash(value: object) -> bool:
    """Whether a value is a SHA-256 in hexadecimal."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def content_hash(weights: SAEWeights) -> str:
    """SHA-256 over the weights and the settings that change the encoder, in hexadecimal."""
    return hash_tensors(f"{weights.activation}|{weights.k}|{weights.normalization}", weights.tensors())
