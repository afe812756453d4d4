"""The adapter: config, layer and model, in PEFT's split."""

from .config import YaPOConfig
from .layer import YaPOLayer
from .model import YaPOModel
from .multiplier import set_multiplier, steering

__all__ = ["YaPOConfig", "YaPOLayer", "YaPOModel", "set_multiplier", "steering"]
