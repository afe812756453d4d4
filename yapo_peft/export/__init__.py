"""Adapters in the formats of other programs, each with a verdict on how exact it is there."""

from .constant import ConstantSteering, constant_steering
from .formats import FORMATS, export_adapter

__all__ = ["FORMATS", "ConstantSteering", "constant_steering", "export_adapter"]
