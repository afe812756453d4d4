"""Reads adapters as a server needs them: what they are, and the parts of their SAEs that steer."""

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
from yapo_peft.steering.vector import vector_of

from .settings import Settings, require_name


@dataclass(frozen=True)
class Served:
    """What is known of an adapter wherever requests are read.

    Attributes:
        id: Its number, never given twice: names can be.
        slot: Its place in the workers.
        name: What requests call it.
        source: Its folder or Hub id.
        digest: SHA-256 over its codes, SAEs and positions, in hexadecimal: what prefixes are cached under.
        layers: The blocks that it steers.
        features: The most features that it moves at a block, and so reads there at one sign or the other.
        positions: Which tokens it steers.
        multiplier: The multiplier of requests that name none.
        signs: At which signs of the multiplier a part of its SAEs is enough.
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
        """Its fields, of plain types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Served:
        """What `to_dict` returned."""
        plain: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in fields.items()}
        return cls(**plain)


@dataclass(frozen=True)
class BlockPart:
    """What an adapter needs at one block.

    Attributes:
        values: Its code's entries that are not zero, `(n,)` in float32; none of a dense code.
        up: What all tokens get at multiplier 1, `(d_model,)` in float32.
        down: What all tokens lose at multiplier -1, `(d_model,)` in float32.
        sae: Those features of the SAE, on the CPU; None where they cannot be read (TopK), or there is no SAE.
        normalization: Of the SAE.
    """

    values: Tensor
    up: Tensor
    down: Tensor
    sae: SAEWeights | None
    normalization: Normalization


class AdapterFile(SavedAdapter):
    """A saved adapter, as a server needs it."""

    def describe(self, id: int, slot: int, name: str, d_model: int, depth: int) -> Served:
        """What is to be known of it, and that it fits a model.

        Raises:
            AdapterFileError: It is damaged.
            SAEMismatchError: It is of another model.
        """
        layers = self.config.layer_indices()
        if max(layers) >= depth or min(layers) < 0:
            raise SAEMismatchError(
                f"Adapter {name!r} steers block {max(layers)}, and the served model has {depth}: it is of another one."
            )
        for identity in self.identities.values():
            if identity is not None and identity.d_in != d_model:
                raise SAEMismatchError(
                    f"Adapter {name!r} steers activations of width {identity.d_in}, and the served model's are "
                    f"{d_model} wide: it is of another one."
                )
        self._require_saes()
        codes = self.codes(d_model)
        signs = {1, -1}
        for layer, identity in self.identities.items():
            if identity is not None and identity.architecture == "topk":
                signs &= {sign for sign in (1, -1) if not (sign * codes[layer] < 0).any()}
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

    def parts(self, d_model: int) -> dict[int, BlockPart]:
        """What steers at each block. Only this reads SAEs.

        Raises:
            SAENotFoundError: An SAE is not where the adapter says, and the adapter carries no part of it.
            SAEMismatchError: The SAE there is another one.
        """
        return {layer: self._part(layer, code) for layer, code in self.codes(d_model).items()}

    def _require_saes(self) -> None:
        """Raises if a folder that an SAE should be in is not there; nothing is read."""
        folders = [self.config.sae_source(place)["path"] for place in range(len(self.identities))]
        gone = [folder for folder in folders if folder is not None and not Path(folder, "cfg.json").is_file()]
        if gone and not self.config.self_contained:
            raise SAENotFoundError(
                f"The adapter's SAE is not in {gone[0]!r}. Save the adapter with self_contained=True, so that its file "
                "carries what it needs of it, or put the SAE there."
            )

    def _part(self, layer: int, code: Tensor) -> BlockPart:
        sae = self.sae(layer)
        if sae is None:
            return BlockPart(code[:0], vector_of(code, None), vector_of(code, None), None, "none")
        indices = code.nonzero().squeeze(-1)
        cpu = torch.device("cpu")
        part = None if sae.activation == "topk" else sae.select(indices, cpu, sae.dtype)
        up, down = (vector_of(code, sae, sign) for sign in ((1, -1) if part is not None else (None, None)))
        return BlockPart(code[indices], up, down, part, sae.normalization)

    def _digest(self, codes: dict[int, Tensor]) -> str:
        saes = {layer: identity and identity.content_hash for layer, identity in sorted(self.identities.items())}
        head = f"{self.config.positions}|{self.config.space}|{saes}"
        return hash_tensors(head, ((str(layer), code) for layer, code in sorted(codes.items())))


@dataclass(frozen=True)
class Prepared:
    """What a server is started for; each of its processes finds the same.

    Attributes:
        d_model: Width of the model's activations.
        depth: Number of its blocks.
        adapters: Those that are served from the start.
        layers: The blocks that can be steered.
        features: How many features of a block an adapter may move.
    """

    d_model: int
    depth: int
    adapters: tuple[Served, ...]
    layers: tuple[int, ...]
    features: int

    @classmethod
    def of(cls, settings: Settings, model_config: Any) -> Prepared:
        """Reads the first adapters, and checks that all of it fits vLLM's model.

        Raises:
            ConfigError: A setting, or an adapter that it names, does not work.
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
                f"YAPO_LAYERS names block {layers[-1]}, and the served model has {depth}: use 0 to {depth - 1}."
            )
        features = settings.max_features
        if features is None:
            features = max([256, *(adapter.features for adapter in adapters)])
        return cls(d_model, depth, tuple(adapters), tuple(layers), features)

    def require_room(self, adapter: Served) -> None:
        """Raises unless an adapter fits into what the server has prepared.

        Raises:
            UnsupportedOperationError: It does not.
        """
        other = sorted({*adapter.layers} - {*self.layers})
        if other:
            wanted = ",".join(str(layer) for layer in sorted({*self.layers, *adapter.layers}))
            raise UnsupportedOperationError(
                f"Adapter {adapter.name!r} steers block {other[0]}, and the server was started to steer "
                f"{[*self.layers]}: start it with YAPO_LAYERS={wanted}."
            )
        if adapter.features > self.features:
            raise UnsupportedOperationError(
                f"Adapter {adapter.name!r} moves {adapter.features} features of a block, and the server was started "
                f"with room for {self.features}: prune it (yapo prune), or start with "
                f"YAPO_MAX_FEATURES={adapter.features}."
            )
