"""Loads and creates preference datasets in TRL's format."""

from .choices import choice_pairs, choice_prompt, letters, load_choices
from .contrast import generate_contrast
from .preferences import load_pairs, load_prompts, with_system_prompt
from .rejected import generate_rejected
from .sources import load_rows, where

__all__ = [
    "choice_pairs",
    "choice_prompt",
    "generate_contrast",
    "generate_rejected",
    "letters",
    "load_choices",
    "load_pairs",
    "load_prompts",
    "load_rows",
    "where",
    "with_system_prompt",
]
