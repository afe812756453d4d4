"""Reads saved adapters without a model: their configs, their codes and their SAEs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from huggingface_hub import hf_hub_download
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..errors import AdapterFileError, YaPOError
from ..sae import FrozenSAE, SAEIdentity, SAEPart
from .codes import unpack_codes
from .parts import pack_part, unpack_part

if TYPE_CHECKING:
    from ..tuner import YaPOConfig


class SavedAdapter:
    """A saved adapter.

    Args:
        source: A folder that `save_pretrained` wrote, or a Hub id.

    Attributes:
        config: Its config.
        identities: The SAE of each layer, by the layer's index; None for dense codes.

    Raises:
        AdapterFileError: The adapter is damaged, cannot be reached, or belongs to another PEFT method.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        try:
            config = PeftConfig.from_pretrained(source)
            method = getattr(config.peft_type, "value", config.peft_type)
            if method != "YAPO":
                raise AdapterFileError(f"{source!r} is an adapter of PEFT's method {method}, not of YaPO.")
            require_whole(source)
            # Not by PEFT's function, which falls back to pickled files.
            name = SAFETENSORS_WEIGHTS_NAME
            file = Path(source, name) if Path(source).is_dir() else hf_hub_download(source, name)
            self._tensors = load_file(file)
        except YaPOError:
            raise
        except Exception as error:
            raise AdapterFileError(
                f"No adapter can be read from {source!r} ({type(error).__name__}: {error}). Give the folder that "
                f"save_pretrained wrote, with {SAFETENSORS_WEIGHTS_NAME}, or the id of a Hub repository that can be "
                "reached."
            ) from error
        self.config = cast("YaPOConfig", config)
        self.identities = {
            layer: SAEIdentity.from_dict(self.config.recorded_sae(place)) if self.config.space == "sae" else None
            for place, layer in enumerate(self.config.layer_indices())
        }

    def folder_in_cache(self) -> str:
        """Returns the folder of the Hub's cache that holds the adapter, once it was read from the Hub."""
        return str(Path(hf_hub_download(self.source, CONFIG_NAME, local_files_only=True)).parent)

    def codes(self, d_model: int) -> dict[int, Tensor]:
        """Returns the code of each layer, `(d_sae,)` or `(d_model,)`, by the layer's index.

        Raises:
            AdapterFileError: A tensor is missing, unknown, or does not fit.
        """
        return unpack_codes(self._tensors, self.identities, d_model)

    def sae(self, layer: int) -> FrozenSAE | None:
        """Returns the SAE of a layer, or what a self-contained adapter carries of it; None for dense codes.

        Raises:
            AdapterFileError: The part is damaged or missing.
            SAENotFoundError: The SAE is not where the config says.
            SAEMismatchError: The SAE there is another one.
        """
        identity = self.identities[layer]
        if identity is None:
            return None
        sae = self.config.load_sae(self.config.layer_indices().index(layer))
        sae.identity.require_same(identity.to_dict(), f"layer {layer}")
        if isinstance(sae, SAEPart):
            sae.fill(*unpack_part(layer, self._tensors, identity))
        return sae

    def self_contained(self) -> dict[str, Tensor]:
        """Returns the tensors of its file, with the parts of its SAEs that its codes need; raises as `sae`."""
        tensors, clamps = dict(self._tensors), self.config.mode == "clamp"
        for layer in self.identities:
            sae, end = self.sae(layer), f".{layer}.yapo.yapo_code.indices"
            if sae is not None and not self.config.self_contained:
                name = next(name for name in tensors if name.endswith(end)).removesuffix(".indices")
                tensors |= pack_part(name, self._tensors, sae, clamps)
        return tensors


def require_whole(folder: str | Path) -> None:
    """Checks the file of an adapter in a local folder, if there is one, without reading its tensors.

    Raises:
        AdapterFileError: The file is truncated or not a safetensors file.
    """
    file = Path(folder, SAFETENSORS_WEIGHTS_NAME)
    if not file.is_file():
        if file.with_name(WEIGHTS_NAME).is_file():
            raise AdapterFileError(
                f"{str(folder)!r} has {WEIGHTS_NAME}, but no {SAFETENSORS_WEIGHTS_NAME}: pickled files can execute "
                "code, so they are not loaded. Save the adapter again with save_pretrained."
            )
        return
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise AdapterFileError(
            f"{str(file)!r} is truncated or not a safetensors file ({error}). Save or download the adapter again."
        ) from error
