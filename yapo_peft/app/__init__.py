"""A local playground: adjust adapters and single features, and read the model's answers."""

from .page import build_page, serve_page
from .playground import Dials, Playground, adapter_name_of

__all__ = ["Dials", "Playground", "adapter_name_of", "build_page", "serve_page"]
