"""Exports adapters to the formats of other programs, with a verdict on how exact each export is."""

from .constant import ConstantSteering, constant_steering
from .formats import FORMATS, export_adapter

__all__ = ["FORMATS", "ConstantSteering", "constant_steering", "export_adapter"]
