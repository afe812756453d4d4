"""Measures of a steered model, one file each, their comparison and their plots."""

from .choice import GeneratedChoice, MultipleChoice
from .choose import Candidate, Choice, choose
from .culture import cultural_scores, normalised_localization_gap, robust_cultural_accuracy
from .damage import Damage, Repetition
from .judge import RUBRICS, Judge, JudgeUsage
from .lm_eval import evaluate_tasks, sweep_tasks
from .matched_damage import at_matched_damage
from .plots import plot_choice, plot_dose_response, plot_losses, plot_matched_damage
from .preference import Preference
from .scores import Scores
from .sweep import AnswerMeasure, LikelihoodMeasure, sweep

__all__ = [
    "RUBRICS",
    "AnswerMeasure",
    "Candidate",
    "Choice",
    "Damage",
    "GeneratedChoice",
    "Judge",
    "JudgeUsage",
    "LikelihoodMeasure",
    "MultipleChoice",
    "Preference",
    "Repetition",
    "Scores",
    "at_matched_damage",
    "choose",
    "cultural_scores",
    "evaluate_tasks",
    "normalised_localization_gap",
    "plot_choice",
    "plot_dose_response",
    "plot_losses",
    "plot_matched_damage",
    "robust_cultural_accuracy",
    "sweep",
    "sweep_tasks",
]
