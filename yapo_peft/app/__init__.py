"""A local playground: adjust adapters and single features, and read the model's answers."""

from .page import build_page, serve_page
from .playground import Dials, Playground

__all__ = ["Dials", "Playground", "build_page", "serve_page"]
