"""Loads SAEs with sae-lens, once per process. With SAE training, the only place that imports sae_lens."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConfigError, SAENotFoundError, UnsupportedSAEError
from .frozen import FrozenSAE
from .identity import SAEIdentity, content_hash
from .weights import Activation, SAEWeights

if TYPE_CHECKING:
    from sae_lens import SAE
    from sae_lens.loading.pretrained_saes_directory import PretrainedSAELookup

_ACTIVATIONS: dict[str, Activation] = {
    "standard": "relu",
    "jumprelu": "jumprelu",
    "topk": "topk",
    "gated": "gated",
}
_TRANSCODER = "it does not reconstruct its own input"
_UNSUPPORTED = {
    "transcoder": _TRANSCODER,
    "skip_transcoder": _TRANSCODER,
    "jumprelu_transcoder": _TRANSCODER,
    "jumprelu_skip_transcoder": _TRANSCODER,
    "temporal": "its features depend on other tokens",
    "matching_pursuit": "its encoder is iterative, not element-wise",
    "abstopk": "its features can be negative, but steering clips them at zero",
}
_NORMALIZATIONS = ("none", "layer_norm", "constant_norm_rescale")

_FILES = ("cfg.json", "sae_weights.safetensors")
# What sae-lens saves beside the weights of an SAE whose training has not ended: the factor its input is scaled by.
_SCALER = "activation_scaler.json"

_by_source: dict[tuple[str, ...], weakref.ref[FrozenSAE]] = {}
_by_hash: weakref.WeakValueDictionary[str, FrozenSAE] = weakref.WeakValueDictionary()
_registered: dict[str, FrozenSAE] = {}


def load_sae(
    *, release: str | None = None, sae_id: str | None = None, path: str | None = None, content_hash: str | None = None
) -> FrozenSAE:
    """Returns an SAE, loading it unless this process has it already.

    Args:
        release: Name of a release in sae-lens' directory; requires `sae_id`.
        sae_id: Name of the SAE within the release.
        path: A local folder in sae-lens' format (`cfg.json`, `sae_weights.safetensors`).
        content_hash: The expected hash. A registered SAE with this hash takes precedence over a release, and over a
            folder that does not exist.

    Raises:
        SAENotFoundError: The release, the SAE or the folder does not exist, or no source was given.
        UnsupportedSAEError: The SAE's architecture or normalisation is not supported.
    """
    registered = _registered.get(content_hash or "")
    if path is not None and (registered is None or Path(path).is_dir()):
        source = ("path", str(Path(path).resolve()), _stamp(Path(path)))
    elif registered is not None:
        return registered
    elif release is not None and sae_id is not None:
        source = ("release", release, sae_id)
    else:
        raise SAENotFoundError(
            "No SAE was specified: pass sae_release and sae_id, or sae_path, or call yapo_peft.register_sae(sae) "
            "before loading the adapter."
        )
    reference = _by_source.get(source)
    frozen = reference() if reference is not None else None
    if frozen is None:
        with torch.inference_mode(False):
            if source[0] == "path":
                # sae-lens maps the file into memory, where whoever writes to it would change the weights.
                frozen = _freeze(read_sae(path=source[1]), None, None, copy=True)
            else:
                frozen = _freeze(read_sae(release=release, sae_id=sae_id), release, sae_id)
        _by_source[source] = weakref.ref(frozen)
    return frozen


def read_sae(*, release: str | None = None, sae_id: str | None = None, path: str | None = None) -> SAE[Any]:
    """Reads an SAE of sae-lens, on the CPU, from a folder or a release. Raises `SAENotFoundError` if there is none."""
    if path is not None:
        return _from_folder(path)
    if release is None or sae_id is None:
        raise SAENotFoundError("No SAE was specified: pass path, or release and sae_id.")
    return _from_release(release, sae_id)


def register_sae(sae: SAE[Any]) -> str:
    """Registers an SAE, so that configs and saved adapters with its hash find it without a path.

    A copy stays in memory until the process ends; later changes to `sae` do not affect it.

    Args:
        sae: An SAE object of sae-lens; a training SAE is converted to its inference form.

    Returns:
        The content hash of the SAE.

    Raises:
        ConfigError: `sae` is something else.
        UnsupportedSAEError: The SAE's architecture or normalisation is not supported.
    """
    with torch.inference_mode(False):
        frozen = _freeze(sae, None, None, copy=True)
    _registered[frozen.identity.content_hash] = frozen
    return frozen.identity.content_hash


def saes_directory() -> dict[str, PretrainedSAELookup]:
    """Returns sae-lens' directory, by the name of the release."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    return get_pretrained_saes_directory()


def require_listed(release: str, sae_id: str) -> PretrainedSAELookup:
    """Returns the entry of a release in sae-lens' directory that has a given SAE.

    Raises:
        SAENotFoundError: The release or the SAE does not exist.
    """
    directory = saes_directory()
    if release not in directory:
        raise SAENotFoundError(
            f"sae-lens has no release {release!r}, and it is not a Hub repository ('owner/name'): list a model's SAEs "
            "with `yapo sae list` or yapo_peft.sae.find_saes."
        )
    if sae_id not in directory[release].saes_map:
        known = sorted(directory[release].saes_map)
        raise SAENotFoundError(
            f"Release {release!r} has no SAE {sae_id!r}: use one of its {len(known)}, such as {', '.join(known[:5])}."
        )
    return directory[release]


def neuronpedia_id(release: str | None, sae_id: str | None) -> str | None:
    """The id of an SAE on Neuronpedia, as "model/source"; None if sae-lens' directory does not list one."""
    if release is None or sae_id is None:
        return None
    found = saes_directory().get(release)
    return (found.neuronpedia_id.get(sae_id) or None) if found is not None else None


def _stamp(folder: Path) -> str:
    """A string that changes when another SAE is saved to the folder."""
    files = [folder / name for name in (*_FILES, _SCALER)]
    return "".join(f"{s.st_mtime_ns}:{s.st_size};" for s in (file.stat() for file in files if file.is_file()))


def _from_folder(path: str) -> SAE[Any]:
    folder = Path(path)
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise SAENotFoundError(
            f"No SAE in {str(folder)!r}: {' and '.join(missing)} missing. sae_path must be a folder saved by sae-lens' "
            f"save_model or save_inference_model, absolute or relative to the working directory {str(Path.cwd())!r}."
        )
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder, device="cpu")
    if sae.cfg.normalize_activations == "expected_average_only_in" and (folder / _SCALER).is_file():
        factor = json.loads((folder / _SCALER).read_text())["scaling_factor"]
        if factor is not None:
            sae.fold_activation_norm_scaling_factor(factor)
    return sae


def _from_release(release: str, sae_id: str) -> SAE[Any]:
    from sae_lens import SAE

    if "/" not in release or release in saes_directory():
        require_listed(release, sae_id)
    try:
        return SAE.from_pretrained(release, sae_id, device="cpu")
    except (OSError, ValueError) as error:
        raise SAENotFoundError(f"Could not load SAE {sae_id!r} of release {release!r}: {error}") from error


def _freeze(sae: SAE[Any], release: str | None, sae_id: str | None, copy: bool = False) -> FrozenSAE:
    weights, architecture = _extract(sae)
    identity = SAEIdentity(
        release=release,
        sae_id=sae_id,
        d_in=weights.d_in,
        d_sae=weights.d_sae,
        architecture=architecture,
        content_hash=content_hash(weights),
    )
    frozen = _by_hash.get(identity.content_hash)
    hook_name = sae.cfg.metadata.hook_name
    if frozen is None:
        frozen = FrozenSAE(weights.clone() if copy else weights, identity, hook_name)
    elif frozen.hook_name != hook_name or (release is not None and frozen.identity != identity):
        frozen = frozen.renamed(identity, hook_name)
    _by_hash[identity.content_hash] = frozen
    return frozen


@torch.no_grad()
def _extract(sae: SAE[Any]) -> tuple[SAEWeights, str]:
    """Converts an SAE of sae-lens; returns its weights and the name of its architecture."""
    from sae_lens import SAE, TrainingSAE

    if not isinstance(sae, SAE):
        raise ConfigError(f"sae is a {type(sae).__name__}: must be an SAE of sae-lens, as SAE.from_pretrained returns.")
    state = sae.state_dict()
    cfg: dict[str, Any] = sae.cfg.to_dict()
    if isinstance(sae, TrainingSAE):
        sae.process_state_dict_for_saving_inference(state)
        cfg = sae.cfg.get_inference_sae_cfg_dict()
    architecture = str(cfg["architecture"])
    _require_supported(architecture, cfg)
    activation = _ACTIVATIONS[architecture]
    state = {name: value.detach() for name, value in state.items()}
    W_enc, W_dec = state["W_enc"], state["W_dec"]
    b_enc = state["b_gate"] if activation == "gated" else state["b_enc"]
    if cfg.get("rescale_acts_by_decoder_norm"):
        # These TopK SAEs rank features as if the decoder had unit rows, which equals folding the norms in.
        norm = W_dec.norm(dim=-1)
        W_enc, b_enc, W_dec = W_enc * norm, b_enc * norm, W_dec / norm[:, None]
    weights = SAEWeights(
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=W_dec,
        b_in=state["b_dec"] if cfg["apply_b_dec_to_input"] else None,
        activation=activation,
        threshold=state["threshold"] if activation == "jumprelu" else None,
        magnitude_scale=state["r_mag"].exp() if activation == "gated" else None,
        magnitude_bias=state["b_mag"] if activation == "gated" else None,
        k=int(cfg["k"]) if activation == "topk" else None,
        normalization=cfg["normalize_activations"],
    )
    return weights, architecture


def _require_supported(architecture: str, cfg: dict[str, Any]) -> None:
    if architecture not in _ACTIVATIONS:
        reason = _UNSUPPORTED.get(architecture, "it is unknown")
        raise UnsupportedSAEError(
            f"SAE architecture {architecture!r} is not supported: {reason}. Supported: {', '.join(_ACTIVATIONS)}."
        )
    if cfg["normalize_activations"] not in _NORMALIZATIONS:
        raise UnsupportedSAEError(
            f"The SAE's normalize_activations={cfg['normalize_activations']!r} is not supported: fold it into the "
            "weights first, as sae-lens does at the end of training (sae.fold_activation_norm_scaling_factor), or keep "
            f"{_SCALER}, which sae-lens saves during training, beside them."
        )
    if cfg.get("reshape_activations", "none") != "none":
        raise UnsupportedSAEError(
            f"The SAE's reshape_activations={cfg['reshape_activations']!r} is not supported: it reads attention heads; "
            "use an SAE of the residual stream."
        )
