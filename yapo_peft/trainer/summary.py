"""The model card of a training run: its settings and its last evaluation."""

from __future__ import annotations

from typing import Any, cast

from huggingface_hub import ModelCard
from torch import nn
from transformers import TrainerState

from ..adapter_file.card import model_card
from .config import YaPOTrainingConfig

_SETTINGS = ("learning_rate", "learning_rate_unit", "beta", "direction", "reference")
_METRICS = ("eval_loss", "eval_accuracy/plus", "eval_accuracy/zero", "eval_accuracy/minus")


def training_card(
    model: nn.Module, args: YaPOTrainingConfig, state: TrainerState, tags: list[str], **options: Any
) -> ModelCard:
    """The card of the trained adapter, as of a state of the training.

    Args:
        model: The model with its adapter.
        args: The training config.
        state: The trainer's state.
        tags: Tags in addition to those of `model_card`.
        **options: As for `model_card`.
    """
    settings = {name: getattr(args, name) for name in _SETTINGS} | {
        "loss_type": ", ".join(args.loss_type),
        "pairs per step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "steps": state.global_step,
        "epochs": f"{state.epoch or 0:g}",
    }
    evaluations = [entry for entry in state.log_history if "eval_loss" in entry]
    metrics = {name: evaluations[-1][name] for name in _METRICS if name in evaluations[-1]} if evaluations else None
    card = model_card(model, metrics=metrics, training=settings, **options)
    data = cast(Any, card.data)
    data.tags = list(dict.fromkeys([*data.tags, *tags]))
    return card
