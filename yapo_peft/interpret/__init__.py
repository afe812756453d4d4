"""Explains adapters: the features they steer, where those are active, and what each contributes."""

from .attribution import Attribution, attribute
from .compare import compare, compare_features, read_vector
from .explain import explain
from .passages import contexts
from .search import find_features
from .tokens import TokenEffects, token_effects

__all__ = [
    "Attribution",
    "TokenEffects",
    "attribute",
    "compare",
    "compare_features",
    "contexts",
    "explain",
    "find_features",
    "read_vector",
    "token_effects",
]
