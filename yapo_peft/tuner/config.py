"""The config of a sparse steering adapter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import InitVar, dataclass
from enum import Enum
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.peft_types import PeftType, TaskType
from torch import Tensor

from .._utils import choice, finite, hash_tensors, help_from_docstring, is_finite, listed
from ..adapter_file.card import save_card
from ..adapter_file.reading import require_whole
from ..errors import AdapterFileError, ConfigError, UnsupportedOperationError
from ..sae import FrozenSAE, SAEIdentity, SAEPart, load_sae, register_sae
from ..sae.identity import is_hash
from .positions import span_of

if TYPE_CHECKING:
    from sae_lens import SAE


Space = Literal["sae", "dense"]
Mode = Literal["add", "clamp"]


class _TokenTrainingError(UnsupportedOperationError, AttributeError):
    """Also an AttributeError, so that `hasattr` and `getattr` with a default keep working."""


class YaPOPeftType(str, Enum):  # noqa: UP042 (as PEFT's own, whose members it stands among)
    """The method's name in PEFT's tables; PEFT's own enumeration is closed."""

    YAPO = "YAPO"


@help_from_docstring
@dataclass
class YaPOConfig(PeftConfig):
    """Config of a steering adapter: which layers to steer, in which space, how strongly, and at which tokens.

    Attributes:
        layers: Index of each decoder layer whose output is steered; negative ones count from the end.
        space: "sae" for a code with one entry per feature of a frozen SAE (YaPO, SAS), or "dense" for a vector that is
            added to the layer's output (BiPO, CAA) and needs no SAE.
        mode: "add" to add each entry of a code to its feature's activation, as published; or "clamp" to hold the
            feature at the entry, which `set_features` sets: multiplier 0.5 moves it half of the way there.
        sae_release: Release of each layer's SAE in sae-lens' directory; a single name applies to all layers.
        sae_id: Id of each layer's SAE within its release.
        sae_path: Local sae-lens folder of each layer's SAE, instead of a release and an id.
        multiplier: Multiplier with which a loaded adapter starts: 1 as trained, 0 off, negative for the opposite.
        positions: Tokens to steer: "all" as published; "completion" for generated tokens only; "last" for every token
            from which one of them is predicted; "prompt"; or a slice, such as "prompt[:8]", "prompt[-4:]" or
            "completion[:16]".
        blocks: Name of the list of decoder layers in the model, such as "model.layers". Found for the models of
            transformers; an error lists the names where it is not.
        init_weights: True for a zero code, which changes nothing; False for a small random one, for tests.
        self_contained: Whether to save the part of each SAE that the code needs (some of its rows and columns) with the
            adapter, so that steering with it requires neither the SAE nor sae-lens.
        sae_identity: Identity of each SAE. Filled in when the adapter is attached; leave it empty.
        modules_to_save: Names of other modules to train and save with the codes, such as the new head of a classifier;
            PEFT fills it in for task_type="SEQ_CLS".
        damage: KL(unsteered || steered) of the next token on neutral text at multipliers +1 and -1, "plus" and "minus",
            in nats per token. Filled in by training with `max_kl` and by `calibrate`; None if it was not measured.
        damage_of: Digest of the codes that `damage` was measured on; saving and loading drop the damage of others.
        conversion: What `convert_to_jumprelu` measured, if a TopK SAE was converted. Filled in by it.
        sae: SAE objects of sae-lens, one per layer, instead of a path or a release. Only their content hash is saved;
            to load the adapter, register the same SAE with `yapo_peft.register_sae`.
        task_type: As in PEFT, but "CAUSAL_LM" by default. A model without a language-model head needs its own, such as
            "FEATURE_EXTRACTION" or "SEQ_CLS".

    Raises:
        ConfigError: A field has an invalid value, or the number of SAEs does not match the number of layers.
        AdapterFileError: The identity of an SAE, as saved, is not one.
    """

    layers: int | list[int] | None = None
    space: str = "sae"
    mode: str = "add"
    sae_release: str | list[str] | None = None
    sae_id: str | list[str] | None = None
    sae_path: str | list[str] | None = None
    multiplier: float = 1.0
    positions: str = "all"
    blocks: str | None = None
    init_weights: bool = True
    self_contained: bool = False
    sae_identity: list[dict[str, Any]] | None = None
    modules_to_save: list[str] | None = None
    damage: dict[str, float] | None = None
    damage_of: str | None = None
    conversion: dict[str, float] | None = None
    sae: InitVar[SAE[Any] | list[SAE[Any]] | None] = None

    def __post_init__(self, sae: SAE[Any] | list[SAE[Any]] | None) -> None:
        super().__post_init__()
        self.peft_type = cast(PeftType, YaPOPeftType.YAPO)
        if self.task_type is None:
            # Only PEFT's class for this task hands `generate` to the tuner.
            self.task_type = TaskType.CAUSAL_LM
        # PEFT reads this attribute; it follows from `layers` once the model is known, so it is not a field.
        self.target_modules: list[str] | None = None
        self.layers = self._checked_layers()
        self._check_names()
        if sae is not None and self.space == "dense":
            raise ConfigError("sae= has no meaning with space='dense', which steers without an SAE: leave it out.")
        if sae is not None:
            self._take(sae if isinstance(sae, list) else [sae])
        self._check_saes(len(self.layers))
        span_of(self.positions)
        choice((True, False), init_weights=self.init_weights, self_contained=self.self_contained)
        finite(multiplier=self.multiplier)
        self.multiplier = float(self.multiplier)
        _require_measured("training and calibrate", ("plus", "minus"), damage=self.damage)
        _require_measured("convert_to_jumprelu", ("differ", "error", "kl_plus", "kl_minus"), conversion=self.conversion)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any):  # noqa: ANN206
        """As PEFT's; also checks the adapter's file beside a local config before anything is loaded.

        Raises:
            AdapterFileError: The file is truncated or not a safetensors file.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        require_whole(Path(pretrained_model_name_or_path, subfolder or ""))
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's; also saves a model card, unless the folder has one.

        Raises:
            UnsupportedOperationError: The codes were saved with `safe_serialization=False`, as a pickle.
        """
        folder = Path(save_directory)
        pickle, safe = folder / WEIGHTS_NAME, folder / SAFETENSORS_WEIGHTS_NAME
        if pickle.is_file() and (not safe.is_file() or safe.stat().st_mtime_ns < pickle.stat().st_mtime_ns):
            raise UnsupportedOperationError(
                f"{str(pickle)!r} is a pickle, from which no adapter is loaded: save without safe_serialization=False."
            )
        super().save_pretrained(save_directory, **kwargs)
        save_card(self, Path(save_directory))

    @property
    def trainable_token_indices(self) -> None:
        """Explains why TRL's option to train new tokens is not supported."""
        raise _TokenTrainingError("A YaPO adapter trains codes; it cannot train the embeddings of new tokens as well.")

    def layer_indices(self) -> list[int]:
        """The layers as a list."""
        assert isinstance(self.layers, list)
        return self.layers

    def sae_source(self, position: int) -> dict[str, str | None]:
        """Source of the SAE of the layer at `position` in `layers`, as keyword arguments of `load_sae`."""
        return {
            "release": _pick(self.sae_release, position),
            "sae_id": _pick(self.sae_id, position),
            "path": _pick(self.sae_path, position),
            "content_hash": self.recorded_sae(position).get("content_hash"),
        }

    def recorded_sae(self, position: int) -> dict[str, Any]:
        """Recorded identity of the SAE of the layer at `position` in `layers`; empty before attaching."""
        return self.sae_identity[position] if self.sae_identity else {}

    def load_sae(self, position: int) -> FrozenSAE:
        """Returns the SAE of the layer at `position` in `layers`.

        For a saved self-contained adapter, this is an empty part to be filled from the adapter's file.

        Raises:
            SAENotFoundError: The SAE is not where the config says.
            UnsupportedSAEError: Its architecture or normalisation is not supported.
        """
        recorded, source = self.recorded_sae(position), self.sae_source(position)
        if self.self_contained and "d_sae" in recorded:
            return SAEPart(SAEIdentity.from_dict(recorded), partial(load_sae, **source))
        return load_sae(**source)

    def forget_damage(self) -> None:
        """Drops the recorded damage."""
        self.damage = self.damage_of = None

    def forget_damage_of_others(self, codes: Iterable[Tensor]) -> None:
        """Drops the recorded damage, unless it was measured on these codes, one per layer from the bottom up."""
        if self.damage is not None and self.damage_of != digest_of(codes):
            self.forget_damage()

    @property
    def was_attached(self) -> bool:
        """Whether an adapter with this config has been attached to a model."""
        return bool(self.sae_identity) or self.space == "dense"

    def _checked_layers(self) -> list[int]:
        layers = [self.layers] if isinstance(self.layers, Integral) else self.layers
        if not isinstance(layers, list | tuple) or not layers or not all(map(_is_index, layers)):
            raise ConfigError(f"layers={self.layers!r}: give the index of a layer, or a list of indices.")
        return [int(index) for index in layers]

    def _check_names(self) -> None:
        for name in ("sae_release", "sae_id", "sae_path", "modules_to_save"):
            value = getattr(self, name)
            if not all(isinstance(one, str) and one for one in listed(value)):
                raise ConfigError(f"{name}={value!r:.100}: give a name, or a list of names.")
        identities = self.sae_identity
        if identities is not None and not (isinstance(identities, list) and all(map(_is_identity, identities))):
            raise AdapterFileError(
                f"sae_identity={identities!r:.300} is not what attaching an adapter fills in, one entry per layer: "
                "leave it empty, or save or download the adapter again."
            )
        for identity in identities or []:
            # An SAE that was handed in has only its hash before the adapter is attached.
            if "d_sae" in identity:
                SAEIdentity.from_dict(identity)

    def _take(self, saes: list[SAE[Any]]) -> None:
        if self.sae_release or self.sae_id or self.sae_path or self.sae_identity:
            raise ConfigError("Give either sae= or sae_release and sae_id, or sae_path, not several of them.")
        self.sae_identity = [{"content_hash": register_sae(sae)} for sae in saes]

    def _check_saes(self, count: int) -> None:
        choice(get_args(Space), space=self.space)
        choice(get_args(Mode), mode=self.mode)
        if self.space == "dense":
            self._require_no_sae()
            return
        if self.sae_path is not None and (self.sae_release is not None or self.sae_id is not None):
            raise ConfigError(
                f"sae_path={self.sae_path!r} and sae_release={self.sae_release!r}, sae_id={self.sae_id!r} are both "
                "given: keep either the local folder or the release and its id."
            )
        if (self.sae_release is None) != (self.sae_id is None):
            raise ConfigError(
                f"sae_release={self.sae_release!r} and sae_id={self.sae_id!r} go together: give both, or neither."
            )
        if self.sae_path is None and self.sae_release is None and self.sae_identity is None:
            raise ConfigError(
                f"layers={self.layers} have no SAE: give sae_release and sae_id, sae_path, or an SAE object."
            )
        given = {"sae_id": self.sae_id, "sae_path": self.sae_path, "sae_identity": self.sae_identity}
        if isinstance(self.sae_release, list):
            given["sae_release"] = self.sae_release
        for name, value in given.items():
            number = len(value) if isinstance(value, list) else 1
            if value is not None and number != count:
                raise ConfigError(f"{name} names {number} SAEs for {count} layers ({self.layers}): give one per layer.")

    def _require_no_sae(self) -> None:
        if self.mode == "clamp":
            raise ConfigError("mode='clamp' has no meaning with space='dense', which has no features: leave it out.")
        names = ("sae_release", "sae_id", "sae_path", "sae_identity", "self_contained")
        given = [name for name in names if getattr(self, name)]
        if given:
            raise ConfigError(
                f"{given[0]}={getattr(self, given[0])!r} has no meaning with space='dense', which steers without an "
                "SAE: leave it out, or use space='sae'."
            )


def digest_of(codes: Iterable[Tensor]) -> str:
    """SHA-256 over the entries of codes, in float32, and where they are."""
    entries = [(code.detach().float(), code.detach().nonzero().squeeze(-1)) for code in codes]
    return hash_tensors("", [("", part) for code, indices in entries for part in (indices, code[indices])])


def _is_identity(value: object) -> bool:
    return isinstance(value, dict) and is_hash(value.get("content_hash"))


def _require_measured(by: str, keys: tuple[str, ...], **given: object) -> None:
    """Raises `ConfigError` unless a field is None or has a finite number for each key."""
    ((name, value),) = given.items()
    if value is None:
        return
    if not isinstance(value, dict) or value.keys() != set(keys) or not all(map(is_finite, value.values())):
        listed = ", ".join(map(repr, keys))
        raise ConfigError(f"{name}={value!r:.100}: {by} fills it in ({listed}); leave it out.")


def _is_index(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _pick(value: str | list[str] | None, position: int) -> str | None:
    return value[position] if isinstance(value, list) else value
