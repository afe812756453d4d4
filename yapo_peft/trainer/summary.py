"""The model card of a training run: its settings and its last evaluation."""

from __future__ import annotations

from typing import Any, cast

from huggingface_hub import ModelCard
from torch import nn
from trl import DPOTrainer

from ..adapter_file.card import model_card
from .config import YaPOTrainingConfig

_SETTINGS = ("learning_rate", "learning_rate_unit", "beta", "direction", "reference")
_METRICS = ("eval_loss", "eval_accuracy/plus", "eval_accuracy/zero", "eval_accuracy/minus")


def training_card(trainer: DPOTrainer, tags: list[str], dataset: str | None = None) -> ModelCard:
    """The card of the adapter that a trainer trains, as of now.

    Args:
        trainer: The trainer.
        tags: Tags in addition to those of `model_card`.
        dataset: Name of the preference dataset.
    """
    args, state = cast(YaPOTrainingConfig, trainer.args), trainer.state
    model = cast(nn.Module, trainer.accelerator.unwrap_model(trainer.model))
    chat = bool(getattr(trainer.processing_class, "chat_template", None))
    settings = {name: getattr(args, name) for name in _SETTINGS} | {
        "loss_type": ", ".join(args.loss_type),
        "pairs per step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "steps": state.global_step,
        "epochs": f"{state.epoch or 0:g}",
    }
    evaluations = [entry for entry in state.log_history if "eval_loss" in entry]
    metrics = {name: evaluations[-1][name] for name in _METRICS if name in evaluations[-1]} if evaluations else None
    about: dict[str, Any] = {"repo_id": trainer.hub_model_id, "dataset": dataset, "chat": chat}
    card = model_card(model, metrics=metrics, training=settings, **about)
    data = cast(Any, card.data)
    data.tags = list(dict.fromkeys([*data.tags, *tags]))
    return card
