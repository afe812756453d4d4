"""The model card of a training: its settings and its last evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from huggingface_hub import ModelCard

from ..tuner import model_card

if TYPE_CHECKING:
    from .trainer import YaPOTrainer

_SETTINGS = ("learning_rate", "learning_rate_unit", "beta", "direction", "reference")
_METRICS = ("eval_loss", "eval_accuracy/plus", "eval_accuracy/zero", "eval_accuracy/minus")


def training_card(trainer: YaPOTrainer, dataset: str | None = None, tags: str | list[str] | None = None) -> ModelCard:
    """The card of the adapter that a trainer trains, as far as the training has come."""
    args, state = trainer.args, trainer.state
    settings = {name: getattr(args, name) for name in _SETTINGS} | {
        "loss_type": ", ".join(args.loss_type if isinstance(args.loss_type, list) else [args.loss_type]),
        "pairs per step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "steps": state.global_step,
        "epochs": f"{state.epoch or 0:g}",
    }
    evaluations = [entry for entry in state.log_history if "eval_loss" in entry]
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    card = model_card(
        model,
        repo_id=trainer.hub_model_id,
        dataset=dataset,
        metrics={name: evaluations[-1][name] for name in _METRICS if name in evaluations[-1]} if evaluations else None,
        training=settings,
        chat=bool(getattr(trainer.processing_class, "chat_template", None)),
    )
    data = cast(Any, card.data)
    data.tags = list(dict.fromkeys([*data.tags, "trl", *([tags] if isinstance(tags, str) else tags or [])]))
    return card
