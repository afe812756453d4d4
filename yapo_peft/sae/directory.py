"""Which SAEs of sae-lens' directory can steer a model, read from their names: nothing is downloaded."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from ..errors import SAENotFoundError
from .loader import require_listed, saes_directory

# Names under which the directory lists a model that users know otherwise.
_ALIASES = {"gpt2": "gpt2-small", "mistral-7b-v0.1": "mistral-7b"}
# Widths of the residual streams of models in the directory, as their configs on the Hub say.
_D_MODEL = {
    "gpt2-small": 768, "pythia-70m-deduped": 512, "gemma-2b": 2048, "mistral-7b": 4096,
    "gemma-2-2b": 2304, "gemma-2-9b": 3584, "gemma-2-27b": 4608,
    "gemma-3-270m": 640, "gemma-3-1b": 1152, "gemma-3-4b": 2560, "gemma-3-12b": 3840, "gemma-3-27b": 5376,
    "llama-3-8b": 4096, "llama-3.1-8b": 4096, "llama-3.3-70b": 8192, "deepseek-r1-distill-llama-8b": 4096,
    "qwen2.5-7b": 3584, "qwen3-1.7b": 2048, "qwen3-8b": 4096, "qwen3-30b-a3b": 2048, "gpt-oss-20b": 2880,
}  # fmt: skip
# What a model is called after tuning; its base model's SAEs fit it too, as the paper uses them.
_TUNED = re.compile(r"-(it|instruct|chat|pt|base)(?=-|$)")
_OTHER_HOOKS = re.compile(
    r"transcoder|crosscoder|\batt\b|attn|\bmlp\b|hook_z|resid[-_]mid|embedding|temporal|lx[am]_|clt"
)
_LAYER = re.compile(r"(?:^|[._/-])(?:layers?_?|blocks\.|l)(\d+)(?=$|[._/r-])")
_WIDTH = re.compile(
    r"(?:^|[^a-z\d])(?:width[_-]|w)?(\d+)k(?=$|[^a-z\d])|width[_-](\d+)m|width-2pow(\d+)|resid_pre_(\d+)$"
)


@dataclass(frozen=True)
class ListedSAE:
    """An SAE of the directory, as far as its entry and its name tell.

    Attributes:
        release: Name of its release.
        sae_id: Its name within the release.
        model: The model that it was trained on.
        layer: The block whose output it reads.
        width: Number of features, rounded as its name is; None if no name says.
        l0: Features on at a token, on average, as published; None if the directory does not say.
        size: About how many bytes its weights take in float32; None where that cannot be told.
        neuronpedia: Where Neuronpedia has it, as "model/source".
        is_of_model: Whether it was trained on the very model that was asked for, and not on its base or a sibling.
    """

    release: str
    sae_id: str
    model: str
    layer: int
    width: int | None
    l0: float | None
    size: int | None
    neuronpedia: str | None
    is_of_model: bool


def find_saes(model: str, layer: int | None = None) -> list[ListedSAE]:
    """Lists the SAEs that read the output of a model's blocks.

    Args:
        model: Name or path of the model, such as "google/gemma-2-2b-it"; what it was tuned from counts, too.
        layer: The block, from 0 on; None for all.

    Returns:
        Those of the very model first, then by layer, width and L0.

    Raises:
        SAENotFoundError: The directory has none of that model; the message lists its models.
    """
    wanted, directory = _plain(model), saes_directory()
    releases = [found for found in directory.values() if _base(_plain(found.model)) == _base(wanted)]
    if not releases:
        known = ", ".join(sorted({found.model for found in directory.values()}))
        raise SAENotFoundError(
            f"sae-lens' directory has no SAE of {model!r}. Train one with examples/train_sae.py, load a local one with "
            f"sae_path, or take one of these models: {known}."
        )
    d_model = _D_MODEL.get(_base(wanted))
    found: list[ListedSAE] = []
    for release in releases:
        own = _tuned_as(release.release) or release.model
        for sae_id, path in release.saes_map.items():
            source, l0 = release.neuronpedia_id.get(sae_id), release.expected_l0.get(sae_id)
            block = _block(release.release, sae_id, path)
            if block is None or (layer is not None and block != layer):
                continue
            width = _width((sae_id, path, release.release, source or ""), d_model)
            size = 4 * (2 * width * d_model + 2 * width + d_model) if width and d_model else None
            l0 = l0 or _l0(path)
            listed = ListedSAE(
                release.release, sae_id, own, block, width, l0, size, source or None, _plain(own) == wanted
            )
            found.append(listed)
    return sorted(found, key=lambda sae: (not sae.is_of_model, sae.layer, sae.width or 0, sae.l0 or 0, sae.release))


def _plain(model: str) -> str:
    name = model.rstrip("/").rpartition("/")[2].lower()
    return _ALIASES.get(name, name).replace("meta-llama-", "llama-")


def _base(name: str) -> str:
    return _TUNED.sub("", name)


def _tuned_as(release: str) -> str | None:
    """Gemma Scope's releases of tuned models, some of which the directory lists under the base model's name."""
    match = re.match(r"gemma-scope-(\d+b)-it-", release)
    return f"gemma-2-{match[1]}-it" if match else None


def _block(release: str, sae_id: str, path: str) -> int | None:
    """The block whose output an SAE reads; None if it reads something else."""
    if any(_OTHER_HOOKS.search(name) for name in (release, sae_id, path)):
        return None
    if match := re.search(r"blocks\.(\d+)\.hook_resid_(pre|post)", sae_id):
        block = int(match[1]) - (match[2] == "pre")
        return block if block >= 0 else None
    match = _LAYER.search(sae_id)
    return int(match[1]) if match else None


def _width(names: Iterable[str], d_model: int | None) -> int | None:
    for name in names:
        if match := _WIDTH.search(name.lower()):
            thousands, millions, power, plain = (int(number) if number else None for number in match.groups())
            if plain or power:
                return plain or 2 ** cast(int, power)
            return _of_thousands(thousands) if thousands else 2**20 * cast(int, millions)
        if (match := re.search(r"_(\d+)x$", name)) and d_model:
            return int(match[1]) * d_model
    return None


def _of_thousands(number: int) -> int:
    """The width that is called 16k, 64k, 65k or 131k: a power of two, in thousands or in units of 1024."""
    near = [2**power for power in range(10, 24) if number in (2**power // 1000, round(2**power / 1000))]
    return near[0] if near else 1024 * number


def _l0(path: str) -> float | None:
    """As the paths of Gemma Scope say it."""
    match = re.search(r"average_l0_(\d+)", path)
    return float(match[1]) if match else None


def describe_sae(release: str, sae_id: str) -> dict[str, Any]:
    """What the directory says of an SAE and, where the Hub can be asked, how much there is to download.

    Raises:
        SAENotFoundError: There is no such release, or no such SAE in it.
    """
    entry = require_listed(release, sae_id)
    path, source = entry.saes_map[sae_id], entry.neuronpedia_id.get(sae_id)
    return {
        "release": release,
        "sae_id": sae_id,
        "model": _tuned_as(release) or entry.model,
        "layer": _block(release, sae_id, path),
        "width": _width((sae_id, path, release, source or ""), _D_MODEL.get(_base(_plain(entry.model)))),
        "l0": entry.expected_l0.get(sae_id) or _l0(path),
        "repository": entry.repo_id,
        "path": path,
        "bytes": _bytes_on_hub(entry.repo_id, path),
        "neuronpedia": f"https://www.neuronpedia.org/{source}" if source else None,
    }


def _bytes_on_hub(repo_id: str, path: str) -> int | None:
    """Sizes of what is at a path of a repository, added up; None if the Hub cannot be asked."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        files = HfApi().model_info(repo_id, files_metadata=True).siblings or []
    except (OSError, OfflineModeIsEnabled):
        return None
    return sum(file.size or 0 for file in files if f"{file.rfilename}/".startswith(f"{path}/")) or None
