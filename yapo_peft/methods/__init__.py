"""Fits, imports and prunes codes without training."""

from .by_hand import set_features
from .caa import fit_caa
from .contrast import AnswerStatistics, Contrast, FeatureStatistics, measure_contrast
from .jumprelu import convert_to_jumprelu
from .migrate import import_vectors
from .prune import prune
from .random_vector import fit_random
from .sas import fit_sas

__all__ = [
    "AnswerStatistics",
    "Contrast",
    "FeatureStatistics",
    "convert_to_jumprelu",
    "fit_caa",
    "fit_random",
    "fit_sas",
    "import_vectors",
    "measure_contrast",
    "prune",
    "set_features",
]
