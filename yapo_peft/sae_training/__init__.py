"""Trains SAEs on the outputs of a model's layers, and measures how well an SAE fits a model."""

from .config import SAETrainingConfig
from .measures import measure_sae
from .training import train_saes

__all__ = ["SAETrainingConfig", "measure_sae", "train_saes"]
