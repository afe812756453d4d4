"""The frozen sparse autoencoder: its weights, its identity, and where it comes from."""

from .identity import SAEIdentity
from .loader import FrozenSAE, load_sae, register_sae
from .weights import SAEWeights

__all__ = ["FrozenSAE", "SAEIdentity", "SAEWeights", "load_sae", "register_sae"]
