"""Served adapters: their description for all processes, and the parts of their SAEs that workers need."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from yapo_peft._utils import hash_tensors
from yapo_peft.adapter_file.reading import SavedAdapter
from yapo_peft.errors import (
    ConfigError,
    SAEMismatchError,
    SAENotFoundError,
    UnsupportedOperationError,
)
from yapo_peft.sae import SAEWeights
from yapo_peft.sae.weights import Normalization
from yapo_peft.steering.formula import vector_of

from .settings import Settings, require_name


@dataclass(frozen=True)
class Served:
    """Description of a served adapter, which all processes share.

    Attributes:
        id: Its number; unlike names, never reused.
        slot: Its slot in the workers.
        name: Its name in requests.
        source: Its folder or Hub id.
        digest: SHA-256 over its codes, SAEs and positions, in hexadecimal; part of the salt of cached prefixes.
        layers: The layers that it steers.
        features: The largest number of features that it moves at a layer.
        positions: Which tokens it steers.
        multiplier: Multiplier of requests that do not give one.
        signs: Signs of the multiplier at which it can be served: one if its file lacks the encoder of a TopK SAE, which
            only the other one needs.
    """

    id: int
    slot: int
    name: str
    source: str
    digest: str
    layers: tuple[int, ...]
    features: int
    positions: str
    multiplier: float
    signs: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns its fields as plain types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Served:
        """Creates it from what `to_dict` returned."""
        plain: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in fields.items()}
        return cls(**plain)


@dataclass(frozen=True)
class LayerPart:
    """What an adapter needs at one layer.

    Attributes:
        values: The non-zero entries of its code, `(n,)` in float32; empty for a dense code.
        up: The shift that all tokens get at multiplier 1, `(d_model,)` in float32.
        down: The shift that all tokens lose at multiplier -1, `(d_model,)` in float32.
        sae: The SAE's features with non-zero entries, on the CPU, and the whole encoder if it is TopK; None without an
            SAE, or if the encoder of a TopK SAE is not needed.
        normalization: The SAE's normalization.
        encoder: Identifies the encoder of a TopK SAE, which adapters share; None for others.
        clamps: Whether the entries are values to hold features at; `up` and `down` are then zero.
    """

    values: Tensor
    up: Tensor
    down: Tensor
    sae: SAEWeights | None
    normalization: Normalization
    encoder: str | None = None
    clamps: bool = False


class AdapterFile(SavedAdapter):
    """A saved adapter that is to be served."""

    def describe(self, id: int, slot: int, name: str, d_model: int, depth: int) -> Served:
        """Describes the adapter after checking that it fits the model, without reading SAEs.

        Raises:
            AdapterFileError: The adapter is damaged.
            SAEMismatchError: The adapter is for another model.
            SAENotFoundError: The folder of its SAE is missing, and the adapter is not self-contained.
        """
        layers = self.config.layer_indices()
        if max(layers) >= depth or min(layers) < 0:
            raise SAEMismatchError(
                f"Adapter {name!r} steers layer {max(layers)}, but the served model has {depth} layers: it is "
                "for another model."
            )
        for identity in self.identities.values():
            if identity is not None and identity.d_in != d_model:
                raise SAEMismatchError(
                    f"Adapter {name!r} steers activations of width {identity.d_in}, but the served model has width "
                    f"{d_model}: it is for another model."
                )
        self._require_saes()
        codes = self.codes(d_model)
        signs, lacks_encoder = {1, -1}, self.config.self_contained and self.config.mode == "add"
        for layer, identity in self.identities.items():
            if identity is not None and identity.architecture == "topk" and lacks_encoder:
                signs &= _signs(codes[layer])
        is_sparse = self.config.space == "sae"
        return Served(
            id=id,
            slot=slot,
            name=require_name(name),
            source=self.source,
            digest=self._digest(codes),
            layers=tuple(layers),
            features=max(int(code.count_nonzero()) for code in codes.values()) if is_sparse else 0,
            positions=self.config.positions,
            multiplier=self.config.multiplier,
            signs=tuple(sorted(signs)),
        )

    def parts(self, d_model: int) -> dict[int, LayerPart]:
        """Returns what workers need at each layer, by its index; reads the SAEs.

        Raises:
            SAENotFoundError: An SAE is not where the config says, and the adapter is not self-contained.
            SAEMismatchError: The SAE there is another one.
        """
        return {layer: self._part(layer, code) for layer, code in self.codes(d_model).items()}

    def _require_saes(self) -> None:
        """Raises if the folder of an SAE is missing; nothing is read."""
        folders = [self.config.sae_source(place)["path"] for place in range(len(self.identities))]
        gone = [folder for folder in folders if folder is not None and not Path(folder, "cfg.json").is_file()]
        if gone and not self.config.self_contained:
            raise SAENotFoundError(
                f"The adapter's SAE is not in {gone[0]!r}. Put it there, or save the adapter with self_contained=True, "
                "so that its file includes the features that it needs."
            )

    def _part(self, layer: int, code: Tensor) -> LayerPart:
        sae = self.sae(layer)
        if sae is None:
            return LayerPart(code[:0], vector_of(code, None), vector_of(code, None), None, "none")
        indices = code.nonzero().squeeze(-1)
        cpu = torch.device("cpu")
        is_topk = sae.activation == "topk"
        # A code without entries lowers no feature.
        clamps = self.config.mode == "clamp"
        lacks_encoder = self.config.self_contained and len(_signs(code)) == 1 and not clamps
        has_encoder = not is_topk or (len(indices) > 0 and not lacks_encoder)
        part = sae.select(indices, cpu, sae.dtype) if has_encoder else None
        up, down = (vector_of(code, sae, sign) for sign in ((1, -1) if has_encoder else (None, None)))
        encoder = sae.identity.content_hash if is_topk and part is not None else None
        if clamps:
            up = down = torch.zeros_like(up)
        return LayerPart(code[indices], up, down, part, sae.normalization, encoder, clamps)

    def _digest(self, codes: dict[int, Tensor]) -> str:
        saes = {layer: identity and identity.content_hash for layer, identity in sorted(self.identities.items())}
        head = f"{self.config.positions}|{self.config.space}|{self.config.mode}|{saes}"
        return hash_tensors(head, ((str(layer), code) for layer, code in sorted(codes.items())))


def _signs(code: Tensor) -> set[int]:
    """The signs of the multiplier at which an adapter can be served whose file is all there is of its TopK SAE."""
    raising = {sign for sign in (1, -1) if not (sign * code < 0).any()}
    # A file with entries of both signs has the encoder.
    return raising or {1, -1}


@dataclass(frozen=True)
class Prepared:
    """What a server prepares at start, the same in each of its processes.

    Attributes:
        d_model: Width of the model's activations.
        depth: Number of its layers.
        adapters: Adapters served from the start.
        layers: The layers that can be steered.
        features: Number of features that an adapter may move at a layer.
    """

    d_model: int
    depth: int
    adapters: tuple[Served, ...]
    layers: tuple[int, ...]
    features: int

    @classmethod
    def of(cls, settings: Settings, model_config: Any) -> Prepared:
        """Reads the first adapters and checks them and the settings against vLLM's model.

        Raises:
            ConfigError: A setting does not fit, or an adapter that it names cannot be served.
        """
        d_model, depth = model_config.get_hidden_size(), model_config.hf_text_config.num_hidden_layers
        adapters: list[Served] = []
        for place, (name, source) in enumerate(settings.adapters.items()):
            try:
                adapters.append(AdapterFile(source).describe(place + 1, place, name, d_model, depth))
            except Exception as error:
                raise ConfigError(f"YAPO_ADAPTERS: {name!r} cannot be served from {source!r}: {error}") from error
        layers = sorted({*settings.layers, *(layer for adapter in adapters for layer in adapter.layers)})
        if layers and layers[-1] >= depth:
            raise ConfigError(
                f"YAPO_LAYERS names layer {layers[-1]}, but the served model has layers 0 to {depth - 1}."
            )
        features = settings.max_features
        if features is None:
            features = max([256, *(adapter.features for adapter in adapters)])
        return cls(d_model, depth, tuple(adapters), tuple(layers), features)

    def check_fits(self, adapter: Served) -> None:
        """Checks that an adapter fits what the server has prepared.

        Raises:
            UnsupportedOperationError: It steers other layers, or moves too many features.
        """
        other = sorted({*adapter.layers} - {*self.layers})
        if other:
            wanted = ",".join(str(layer) for layer in sorted({*self.layers, *adapter.layers}))
            raise UnsupportedOperationError(
                f"Adapter {adapter.name!r} steers layer {other[0]}, but the server was started to steer "
                f"{[*self.layers]}: start it with YAPO_LAYERS={wanted}."
            )
        if adapter.features > self.features:
            raise UnsupportedOperationError(
                f"Adapter {adapter.name!r} moves {adapter.features} features of a layer, but the server was started "
                f"for {self.features}: prune it (yapo prune), or start with "
                f"YAPO_MAX_FEATURES={adapter.features}."
            )
