"""A playground on this machine: dial adapters and single features, and read what the model says."""

from .page import build_page
from .playground import Dials, Playground

__all__ = ["Dials", "Playground", "build_page"]
