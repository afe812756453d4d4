"""Loads sparse autoencoders with sae-lens, once per process. The only file that imports sae_lens."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import SAENotFoundError, UnsupportedSAEError
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
_REFUSED = {
    "transcoder": "it predicts another activation than the one it reads",
    "skip_transcoder": "it predicts another activation than the one it reads",
    "jumprelu_transcoder": "it predicts another activation than the one it reads",
    "jumprelu_skip_transcoder": "it predicts another activation than the one it reads",
    "temporal": "its features depend on other tokens",
    "matching_pursuit": "its encoder is iterative, not element-wise",
    "abstopk": "its features can be negative, and steering keeps them at or above zero",
}

_FILES = ("cfg.json", "sae_weights.safetensors")

_by_source: dict[tuple[str, ...], weakref.ref[FrozenSAE]] = {}
_by_hash: weakref.WeakValueDictionary[str, FrozenSAE] = weakref.WeakValueDictionary()
_registered: dict[str, FrozenSAE] = {}


def load_sae(
    *, release: str | None = None, sae_id: str | None = None, path: str | None = None, content_hash: str | None = None
) -> FrozenSAE:
    """Returns an SAE, loading it only if this process does not hold it yet.

    Args:
        release: Name of a release in sae-lens' directory; needs `sae_id`.
        sae_id: Name of the SAE within the release.
        path: A local folder in sae-lens' format (`cfg.json`, `sae_weights.safetensors`).
        content_hash: Hash of the SAE that is wanted. One that was handed in with that hash is used instead of one
            that would have to be fetched, or whose folder is gone.

    Raises:
        SAENotFoundError: There is no such release, id or folder, or nothing says where to look.
        UnsupportedSAEError: Its architecture or normalisation has no steering rule here.
    """
    handed_in = _registered.get(content_hash or "")
    if path is not None and (handed_in is None or Path(path).is_dir()):
        source = ("path", str(Path(path).resolve()), _stamp(Path(path)))
    elif handed_in is not None:
        return handed_in
    elif release is not None and sae_id is not None:
        source = ("release", release, sae_id)
    else:
        raise SAENotFoundError(
            "Nothing says which SAE to use: give sae_release and sae_id, or sae_path, or hand the SAE in with "
            "yapo_peft.register_sae(sae) before the adapter is loaded."
        )
    reference = _by_source.get(source)
    frozen = reference() if reference is not None else None
    if frozen is None:
        with torch.inference_mode(False):
            if source[0] == "path":
                frozen = _freeze(_from_folder(source[1]), None, None)
            else:
                frozen = _freeze(_from_release(source[1], source[2]), release, sae_id)
        _by_source[source] = weakref.ref(frozen)
    return frozen


def register_sae(sae: SAE[Any]) -> str:
    """Hands an SAE in, so that configs and saved adapters that record its hash find it without a path.

    A copy stays in memory for the life of the process; what happens to `sae` later does not change it.

    Args:
        sae: An SAE object of sae-lens; a training SAE is used as it would be at inference.

    Returns:
        Its content hash.

    Raises:
        UnsupportedSAEError: Its architecture or normalisation has no steering rule here.
    """
    with torch.inference_mode(False):
        frozen = _freeze(sae, None, None, copy=True)
    _registered[frozen.identity.content_hash] = frozen
    return frozen.identity.content_hash


def saes_directory() -> dict[str, PretrainedSAELookup]:
    """sae-lens' directory, by the name of the release."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    return get_pretrained_saes_directory()


def require_listed(release: str, sae_id: str) -> PretrainedSAELookup:
    """A release of sae-lens' directory that has an SAE.

    Raises:
        SAENotFoundError: It has not, or there is no such release.
    """
    directory = saes_directory()
    if release not in directory:
        raise SAENotFoundError(
            f"sae-lens knows no release {release!r}, and it is no 'owner/name' of a Hub repository. `yapo sae list` "
            "and yapo_peft.sae.find_saes list those of a model."
        )
    if sae_id not in directory[release].saes_map:
        known = sorted(directory[release].saes_map)
        raise SAENotFoundError(
            f"Release {release!r} has no SAE {sae_id!r}. It has {len(known)}, such as {', '.join(known[:5])}."
        )
    return directory[release]


def neuronpedia_id(release: str | None, sae_id: str | None) -> str | None:
    """Where Neuronpedia has an SAE of a release, as "model/source"; None where sae-lens' directory does not say."""
    if release is None or sae_id is None:
        return None
    found = saes_directory().get(release)
    return (found.neuronpedia_id.get(sae_id) or None) if found is not None else None


def _stamp(folder: Path) -> str:
    """What changes when another SAE is written to a folder."""
    files = [folder / name for name in _FILES]
    return "".join(f"{s.st_mtime_ns}:{s.st_size};" for s in (file.stat() for file in files if file.is_file()))


def _from_folder(path: str) -> SAE[Any]:
    folder = Path(path)
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise SAENotFoundError(
            f"No SAE in {str(folder)!r}: {' and '.join(missing)} missing. sae_path must be a folder that sae-lens' "
            "save_model or save_inference_model wrote; a relative one starts at the working directory "
            f"({str(Path.cwd())!r})."
        )
    from sae_lens import SAE

    return SAE.load_from_disk(folder, device="cpu")


def _from_release(release: str, sae_id: str) -> SAE[Any]:
    from sae_lens import SAE

    if "/" not in release or release in saes_directory():
        require_listed(release, sae_id)
    try:
        return SAE.from_pretrained(release, sae_id, device="cpu")
    except (OSError, ValueError) as error:
        raise SAENotFoundError(f"Could not fetch SAE {sae_id!r} of release {release!r}: {error}") from error


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
        frozen = frozen.under_another_name(identity, hook_name)
    _by_hash[identity.content_hash] = frozen
    return frozen


@torch.no_grad()
def _extract(sae: SAE[Any]) -> tuple[SAEWeights, str]:
    """The tensors of an SAE as the encoder of `SAEWeights` wants them, and the name of its architecture."""
    from sae_lens import TrainingSAE

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
        # Such a TopK SAE ranks features as if the decoder had unit rows; folding the norms in is the same.
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
        normalization=cfg["normalize_activations"] if cfg["normalize_activations"] in _NORMALIZATIONS else "none",
    )
    return weights, architecture


_NORMALIZATIONS = ("none", "layer_norm", "constant_norm_rescale")


def _require_supported(architecture: str, cfg: dict[str, Any]) -> None:
    if architecture not in _ACTIVATIONS:
        reason = _REFUSED.get(architecture, "it is not known here")
        raise UnsupportedSAEError(
            f"SAE architecture {architecture!r} cannot steer: {reason}. Supported: {', '.join(_ACTIVATIONS)}."
        )
    # sae-lens folds a scaling factor into the weights when it loads or finishes an SAE that used one.
    if cfg["normalize_activations"] not in (*_NORMALIZATIONS, "expected_average_only_in"):
        raise UnsupportedSAEError(
            f"The SAE normalises its input by {cfg['normalize_activations']!r}, which has no steering rule here; fold "
            "it into the weights first (sae-lens does so at the end of training)."
        )
    if cfg.get("reshape_activations", "none") != "none":
        raise UnsupportedSAEError(
            f"The SAE reshapes its input ({cfg['reshape_activations']!r}): it reads attention heads, not the output "
            "of a block."
        )
