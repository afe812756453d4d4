"""Frozen sparse autoencoders (SAEs): loading, identity, and encoder."""

from .directory import ListedSAE, find_saes
from .frozen import FrozenSAE
from .identity import SAEIdentity
from .loader import load_sae, neuronpedia_id, register_sae
from .part import SAEPart
from .weights import SAEWeights

__all__ = [
    "FrozenSAE",
    "ListedSAE",
    "SAEIdentity",
    "SAEPart",
    "SAEWeights",
    "find_saes",
    "load_sae",
    "neuronpedia_id",
    "register_sae",
]
