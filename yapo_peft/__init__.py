"""Sparse activation steering as a PEFT method.

Importing this package registers the method, so that `peft.get_peft_model(model, yapo_peft.YaPOConfig(...))`,
`PeftModel.from_pretrained` and transformers' `model.load_adapter` know it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._version import __version__ as __version__
from .errors import (
    ActivationCacheError,
    AdapterFileError,
    ConfigError,
    DatasetError,
    NonFiniteLossError,
    SAEError,
    SAEMismatchError,
    SAENotFoundError,
    UnsupportedOperationError,
    UnsupportedSAEError,
    YaPOError,
)
from .sae import register_sae
from .tuner import YaPOConfig, YaPOLayer, YaPOModel, model_card, set_multiplier, steering
from .tuner.registration import register

if TYPE_CHECKING:
    from .evaluation.plots import plot_dose_response
    from .evaluation.preference import PreferenceScore, score_preferences, sweep_preferences
    from .trainer import YaPOTrainer, YaPOTrainingConfig
    from .trainer.activations import delete_activation_cache


__all__ = [
    "ActivationCacheError",
    "AdapterFileError",
    "ConfigError",
    "DatasetError",
    "NonFiniteLossError",
    "PreferenceScore",
    "SAEError",
    "SAEMismatchError",
    "SAENotFoundError",
    "UnsupportedOperationError",
    "UnsupportedSAEError",
    "YaPOConfig",
    "YaPOError",
    "YaPOLayer",
    "YaPOModel",
    "YaPOTrainer",
    "YaPOTrainingConfig",
    "delete_activation_cache",
    "model_card",
    "plot_dose_response",
    "register_sae",
    "score_preferences",
    "set_multiplier",
    "steering",
    "sweep_preferences",
]

# These pull in TRL or matplotlib, which a program that only steers does not need.
_LAZY = {
    "YaPOTrainer": "trainer",
    "delete_activation_cache": "trainer.activations",
    "YaPOTrainingConfig": "trainer",
    "PreferenceScore": "evaluation.preference",
    "score_preferences": "evaluation.preference",
    "sweep_preferences": "evaluation.preference",
    "plot_dose_response": "evaluation.plots",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


register()
