"""Sparse activation steering as a PEFT method.

Importing this package registers the method, so that `peft.get_peft_model(model, yapo_peft.YaPOConfig(...))`,
`PeftModel.from_pretrained` and transformers' `model.add_adapter` know it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._version import __version__ as __version__
from .adapter_file.card import model_card
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
from .tuner import YaPOConfig, YaPOLayer, YaPOModel, set_multiplier, steering
from .tuner.registration import register

if TYPE_CHECKING:
    from .evaluation import Scores, plot_dose_response, sweep
    from .scoring.calibration import calibrate
    from .scoring.store import delete_activation_cache
    from .trainer import YaPOTrainer, YaPOTrainingConfig


__all__ = [
    "ActivationCacheError",
    "AdapterFileError",
    "ConfigError",
    "DatasetError",
    "NonFiniteLossError",
    "SAEError",
    "SAEMismatchError",
    "SAENotFoundError",
    "Scores",
    "UnsupportedOperationError",
    "UnsupportedSAEError",
    "YaPOConfig",
    "YaPOError",
    "YaPOLayer",
    "YaPOModel",
    "YaPOTrainer",
    "YaPOTrainingConfig",
    "calibrate",
    "delete_activation_cache",
    "model_card",
    "plot_dose_response",
    "register_sae",
    "set_multiplier",
    "steering",
    "sweep",
]

# These pull in TRL or matplotlib, which a program that only steers does not need.
_LAZY = {
    "YaPOTrainer": "trainer",
    "calibrate": "scoring.calibration",
    "delete_activation_cache": "scoring.store",
    "YaPOTrainingConfig": "trainer",
    "Scores": "evaluation",
    "plot_dose_response": "evaluation",
    "sweep": "evaluation",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


register()
