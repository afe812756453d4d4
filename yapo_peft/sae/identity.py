"""Which sparse autoencoder an adapter was trained on."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from .._utils import hash_tensors
from ..errors import AdapterFileError, SAEMismatchError
from .weights import SAEWeights


@dataclass(frozen=True)
class SAEIdentity:
    """What an adapter remembers of its sparse autoencoder, as plain JSON values.

    Attributes:
        release: Name of the release in sae-lens' directory, or None for a local one.
        sae_id: Name within the release, or None for a local one.
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
        """Returns the fields as a dict that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, recorded: dict[str, Any]) -> SAEIdentity:
        """What `to_dict` returned; fields of a later version are left out.

        Raises:
            AdapterFileError: A field is missing, or of another type.
        """
        identity = cls(**{field.name: recorded.get(field.name) for field in dataclasses.fields(cls)})  # pyright: ignore
        is_sound = (
            all(type(number) is int for number in (identity.d_in, identity.d_sae))
            and all(isinstance(name, str | None) for name in (identity.release, identity.sae_id))
            and isinstance(identity.architecture, str)
            and isinstance(identity.content_hash, str)
            and re.fullmatch("[0-9a-f]{64}", identity.content_hash)
        )
        if not is_sound:
            raise AdapterFileError(
                f"sae_identity in adapter_config.json is {recorded!r}: d_in and d_sae must be numbers, architecture a "
                "text, and content_hash 64 hexadecimal digits. Save or download the adapter again."
            )
        return identity

    def require_same(self, recorded: dict[str, Any], where: str) -> None:
        """Raises unless this is the autoencoder that an adapter recorded.

        Where it came from (release, id) may differ as long as the content is the same.

        Args:
            recorded: What `to_dict` returned when the adapter was trained.
            where: The layer, for the message.

        Raises:
            SAEMismatchError: The content differs; the message lists every field that does.
        """
        if recorded.get("content_hash") == self.content_hash:
            return
        here = self.to_dict()
        differing = [
            f"{name}: {recorded.get(name)!r} when trained, {here[name]!r} now"
            for name in here
            if recorded.get(name) != here[name]
        ]
        raise SAEMismatchError(
            f"The adapter was trained on another SAE than the one found for {where} ({'; '.join(differing)}). "
            "A code only has a meaning in the features it was trained on: point the config's sae_release and sae_id, "
            "or sae_path, to the SAE it was trained on."
        )


def content_hash(weights: SAEWeights) -> str:
    """SHA-256 over the weights and the settings that change the encoder, in hexadecimal."""
    return hash_tensors(f"{weights.activation}|{weights.k}|{weights.normalization}", weights.tensors())
