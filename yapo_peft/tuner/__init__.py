"""The adapter: config, layer and model, in PEFT's split."""

from .adapters import set_multiplier, steering
from .config import YaPOConfig
from .layer import YaPOLayer
from .model import YaPOModel

__all__ = ["YaPOConfig", "YaPOLayer", "YaPOModel", "set_multiplier", "steering"]
