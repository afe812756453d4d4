"""The SAEs that are trained: new ones, copies of trained ones to continue with, and how they are saved."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from .._utils import partial_of
from ..errors import ConfigError, UnsupportedSAEError
from .activations import LayerStatistics
from .config import SAETrainingConfig

if TYPE_CHECKING:
    from sae_lens import SAE, TrainingSAE

_FEATURES_PER_DIMENSION, _L0 = 8, 50.0
# What an SAE of an architecture is trained on as: a ReLU is a JumpReLU with thresholds of zero.
_CONTINUED = {"jumprelu": "jumprelu", "standard": "jumprelu", "topk": "topk"}


def require_possible(start: SAE[Any] | None, width: int, config: SAETrainingConfig) -> None:
    """Checks that settings can be met for a layer of a given width, and with an SAE to start from, if any.

    Raises:
        ConfigError: The SAE has another width, or the settings another architecture or number of features, or more
            active features than there are.
        UnsupportedSAEError: SAEs of its kind cannot be trained on.
    """
    d_sae = config.d_sae or _FEATURES_PER_DIMENSION * width
    if start is not None:
        architecture, cfg, d_sae = start.cfg.architecture(), start.cfg, start.cfg.d_sae
        if architecture not in _CONTINUED or cfg.normalize_activations != "none":
            raise UnsupportedSAEError(
                f"An SAE of architecture {architecture!r} with normalize_activations={cfg.normalize_activations!r} "
                f"cannot be trained on: must be one of {', '.join(_CONTINUED)}, with 'none'."
            )
        kind = _CONTINUED[architecture]
        if config.architecture not in (None, kind):
            raise ConfigError(f"architecture={config.architecture!r}: the SAE to start from is trained on as {kind!r}.")
        if config.d_sae not in (None, d_sae):
            raise ConfigError(f"d_sae={config.d_sae}: the SAE to start from has {d_sae} features.")
        require_width(start, width)
    elif config.l0 is None and d_sae < _L0:
        raise ConfigError(f"d_sae={d_sae}: the default l0={_L0:g} is more than that; pass l0.")
    if (config.l0 or 0) > d_sae:
        raise ConfigError(f"l0={config.l0:g}: must not be more than the {d_sae} features.")
    is_topk = config.architecture == "topk" or (start is not None and start.cfg.architecture() == "topk")
    if is_topk and config.l0 is not None and config.l0 != int(config.l0):
        raise ConfigError(f"l0={config.l0!r}: must be a whole number for 'topk'.")


def require_width(sae: SAE[Any], width: int) -> None:
    """Raises `ConfigError` unless an SAE reads outputs of a given width."""
    if sae.cfg.d_in != width:
        raise ConfigError(f"The SAE reads width {sae.cfg.d_in}, but the layer's output has {width}: use another SAE.")


def with_defaults(config: SAETrainingConfig, width: int) -> SAETrainingConfig:
    """The settings of new SAEs of layers of a given width."""
    return replace(
        config,
        architecture=config.architecture or "batchtopk",
        d_sae=config.d_sae or _FEATURES_PER_DIMENSION * width,
        l0=config.l0 or _L0,
    )


def new_sae(width: int, statistics: LayerStatistics, config: SAETrainingConfig) -> TrainingSAE[Any]:
    """An SAE with random weights for a layer of a given width; the settings have no defaults left."""
    architecture, d_sae, l0 = cast(str, config.architecture), cast(int, config.d_sae), cast(float, config.l0)
    torch.manual_seed(config.seed)
    sae = _training_sae(architecture, width, d_sae, l0, config, True)
    # Features then explain deviations from the mean only, and fewer of them die.
    sae.b_dec.data.copy_(statistics.mean * statistics.scale)
    if architecture == "jumprelu":
        _set_thresholds(sae, statistics, l0)
    return sae


@torch.no_grad()
def _set_thresholds(sae: TrainingSAE[Any], statistics: LayerStatistics, l0: float) -> None:
    """Sets thresholds so that features are equally often active, as many as asked for: they learn slowly."""
    _, pre_activations = sae.encode_with_hidden_pre(statistics.sample * statistics.scale)
    share = torch.tensor(1 - l0 / sae.cfg.d_sae)
    sae.get_parameter("threshold").copy_(pre_activations.quantile(share, dim=0).clamp(min=0))


def continued_sae(
    start: SAE[Any], l0: float, statistics: LayerStatistics, config: SAETrainingConfig
) -> TrainingSAE[Any]:
    """A copy of a trained SAE to continue with, in the units of training; its features keep their numbers.

    Args:
        start: The SAE.
        l0: Its active features per token.
        statistics: The layer's.
        config: The settings of training.
    """
    architecture, cfg = start.cfg.architecture(), start.cfg
    kind = _CONTINUED[architecture]
    given = float(cfg.k) if architecture == "topk" else l0
    sae = _training_sae(kind, cfg.d_in, cfg.d_sae, config.l0 or given, config, cfg.apply_b_dec_to_input)
    state = {name: value.float() for name, value in start.state_dict().items()}
    if architecture == "standard":
        state["threshold"] = torch.zeros_like(state["b_enc"])
    sae.load_state_dict(state)
    if architecture == "topk" and not cfg.rescale_acts_by_decoder_norm:
        sae.cfg.rescale_acts_by_decoder_norm = False  # its features are ranked as they are
    else:
        sae.fold_W_dec_norm()
    # All activations are scaled: inputs, and with them biases and thresholds.
    for name, parameter in sae.named_parameters():
        if name in ("b_enc", "b_dec", "threshold"):
            parameter.data *= statistics.scale
    return sae


def _training_sae(
    architecture: str, width: int, d_sae: int, l0: float, config: SAETrainingConfig, subtract: bool
) -> TrainingSAE[Any]:
    from sae_lens import TrainingSAE
    from sae_lens.saes.sae import TrainingSAEConfig

    # Each architecture takes its own.
    settings = {
        "architecture": architecture,
        "d_in": width,
        "d_sae": d_sae,
        "normalize_activations": "expected_average_only_in",
        "apply_b_dec_to_input": subtract,
        "k": int(l0) if architecture == "topk" else l0,
        # The share of a step in the running mean that becomes the threshold: short trainings would not reach it.
        "topk_threshold_lr": max(0.01, min(1.0, 10 / config.steps)),
        "matryoshka_widths": [d_sae // 16, d_sae // 4, d_sae],
        "jumprelu_sparsity_loss_mode": "quadratic",
        "target_l0": l0,
    }
    return TrainingSAE.from_dict(TrainingSAEConfig.from_dict(settings).to_dict())


def save_sae(sae: TrainingSAE[Any], scale: float, folder: Path, config: SAETrainingConfig) -> None:
    """Saves an SAE for inference, in the layer's own units; replaces the folder."""
    from sae_lens import SAE

    sae.fold_activation_norm_scaling_factor(scale)
    if sae.cfg.architecture() == "jumprelu":
        sae.fold_W_dec_norm()
    partial = partial_of(folder)
    try:
        sae.save_inference_model(partial)
        SAE.load_from_disk(partial, dtype=config.dtype).save_model(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
