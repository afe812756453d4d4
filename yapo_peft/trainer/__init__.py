"""Training of codes from preference pairs, on TRL's DPOTrainer."""

from .config import YaPOTrainingConfig
from .trainer import YaPOTrainer

__all__ = ["YaPOTrainer", "YaPOTrainingConfig"]
