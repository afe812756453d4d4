"""Finds SAEs for a model in sae-lens' directory, without downloading them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from ..errors import SAENotFoundError
from .loader import require_listed, saes_directory

if TYPE_CHECKING:
    from sae_lens.loading.pretrained_saes_directory import PretrainedSAELookup

# The directory's names for models that are better known by another name.
_ALIASES = {"gpt2": "gpt2-small", "mistral-7b-v0.1": "mistral-7b"}
# Suffixes of tuned models, which work with the SAEs of their base models, as in the paper.
_TUNED = re.compile(r"-(it|instruct|chat|pt|base)(?=-|$)")
_OTHER_HOOKS = re.compile(
    r"transcoder|crosscoder|\batt\b|attn|\bmlp\b|hook_z|resid[-_]mid|embedding|temporal|lx[am]_|clt"
)
_LAYER = re.compile(r"(?:^|[._/-])(?:layers?_?|blocks\.|l)(\d+)(?=$|[._/r-])")


@dataclass(frozen=True)
class ListedSAE:
    """An entry of sae-lens' directory.

    Attributes:
        release: Name of the release.
        sae_id: Name within the release.
        model: The model it was trained on.
        layer: The layer whose output it reads, from 0.
        l0: Mean number of active features per token, as published; None if the directory does not record it.
        neuronpedia: Its id on Neuronpedia, as "model/source"; None if Neuronpedia does not have it.
        is_of_model: Whether it was trained on the requested model itself, rather than on a related one.
    """

    release: str
    sae_id: str
    model: str
    layer: int
    l0: float | None
    neuronpedia: str | None
    is_of_model: bool


def find_saes(model: str, layer: int | None = None) -> list[ListedSAE]:
    """Lists the SAEs that read the output of a model's layers.

    Args:
        model: Name or path of the model, such as "google/gemma-2-2b-it"; SAEs of its base model are included.
        layer: The layer, from 0; None for all.

    Returns:
        The SAEs, those of the model itself first, then by layer, release and L0.

    Raises:
        SAENotFoundError: The directory has no SAE of this model; the message lists its models.
    """
    wanted, directory = _plain(model), saes_directory()
    releases = [entry for entry in directory.values() if _base(_plain(entry.model)) == _base(wanted)]
    if not releases:
        known = ", ".join(sorted({entry.model for entry in directory.values()}))
        raise SAENotFoundError(
            f"sae-lens' directory has no SAE for {model!r}: train one with `yapo sae train`, pass sae_path for a "
            f"local one, or use one of these models: {known}."
        )
    found = [
        ListedSAE(
            entry.release, sae_id, own, index, _l0(entry, sae_id), entry.neuronpedia_id.get(sae_id) or None,
            _plain(own) == wanted,
        )
        for entry in releases
        for own in [_tuned_as(entry.release) or entry.model]
        for sae_id in entry.saes_map
        if (index := _layer(entry, sae_id)) is not None and layer in (None, index)
    ]  # fmt: skip
    return sorted(found, key=lambda sae: (not sae.is_of_model, sae.layer, sae.release, sae.l0 or 0, sae.sae_id))


def _plain(model: str) -> str:
    name = model.rstrip("/").rpartition("/")[2].lower()
    return _ALIASES.get(name, name).replace("meta-llama-", "llama-")


def _base(name: str) -> str:
    return _TUNED.sub("", name)


def _tuned_as(release: str) -> str | None:
    """The tuned model of a Gemma Scope release, which the directory may list under the base model; else None."""
    match = re.match(r"gemma-scope-(\d+b)-it-", release)
    return f"gemma-2-{match[1]}-it" if match else None


def _layer(entry: PretrainedSAELookup, sae_id: str) -> int | None:
    """The layer whose output an SAE reads; None if it reads another activation."""
    if any(_OTHER_HOOKS.search(name) for name in (entry.release, sae_id, entry.saes_map[sae_id])):
        return None
    if match := re.search(r"blocks\.(\d+)\.hook_resid_(pre|post)", sae_id):
        layer = int(match[1]) - (match[2] == "pre")
        return layer if layer >= 0 else None
    match = _LAYER.search(sae_id)
    return int(match[1]) if match else None


def _l0(entry: PretrainedSAELookup, sae_id: str) -> float | None:
    """The published L0; Gemma Scope's is part of its paths."""
    match = re.search(r"average_l0_(\d+)", entry.saes_map[sae_id])
    return entry.expected_l0.get(sae_id) or (float(match[1]) if match else None)


def size_on_hub(release: str, sae_id: str) -> int | None:
    """Total size of an SAE's files in bytes; None if the Hub cannot be reached, or does not say.

    Raises:
        SAENotFoundError: The release or the SAE does not exist.
    """
    entry = require_listed(release, sae_id)
    path, files = entry.saes_map[sae_id], _files_on_hub(entry.repo_id)
    return sum(size for name, size in files if f"{name}/".startswith(f"{path}/")) or None


def describe_sae(release: str, sae_id: str) -> dict[str, Any]:
    """Returns an SAE's entry in the directory and, if the Hub can be reached, the size of its files in bytes.

    Raises:
        SAENotFoundError: The release or the SAE does not exist.
    """
    entry = require_listed(release, sae_id)
    path, source = entry.saes_map[sae_id], entry.neuronpedia_id.get(sae_id)
    return {
        "release": release,
        "sae_id": sae_id,
        "model": _tuned_as(release) or entry.model,
        "layer": _layer(entry, sae_id),
        "l0": _l0(entry, sae_id),
        "repository": entry.repo_id,
        "path": path,
        "bytes": size_on_hub(release, sae_id),
        "neuronpedia": f"https://www.neuronpedia.org/{source}" if source else None,
    }


@cache
def _files_on_hub(repo_id: str) -> list[tuple[str, int]]:
    """The files of a repository with their sizes; none if the Hub cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        files = HfApi().model_info(repo_id, files_metadata=True).siblings or []
    except (OSError, OfflineModeIsEnabled):
        return []
    return [(file.rfilename, file.size or 0) for file in files]
