"""Checks of the adapter that is trained."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, cast

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import TrainerState, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import get_last_checkpoint
from trl import DPOTrainer

from ..errors import ConfigError, NonFiniteLossError, UnsupportedOperationError
from ..tuner import YaPOConfig, YaPOLayer
from ..tuner.adapters import require_adding, steered_layers
from .config import YaPOTrainingConfig


def is_sharded(trainer: DPOTrainer) -> bool:
    """Whether processes hold parts of the codes."""
    return trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled


# The least learning rate that is not warned about, by its unit; the paper's, in raw units, is 5e-4.
_LEAST_RATE = {"activation": 1e-3, "raw": 1e-4}


def _warn_of_small_rate(args: YaPOTrainingConfig) -> None:
    """Warns of a learning rate that moves a code by next to nothing, such as TRL's and LoRA's."""
    least = _LEAST_RATE[args.learning_rate_unit]
    if 0 < args.learning_rate < least:
        is_raw = args.learning_rate_unit == "raw"
        unit = "the SAE's activations" if is_raw else "typical activations"
        default = "leave learning_rate_unit and it" if is_raw else "leave it"
        warnings.warn(
            f"learning_rate={args.learning_rate} moves an entry of a code by no more than that in a step, in units of "
            f"{unit}, which has next to no effect: {default} out (0.03 typical activations), or give at least {least}.",
            UserWarning,
            stacklevel=4,  # who creates the trainer
        )


def require_arguments(args: Any, ref_model: Any = None, **kwargs: Any) -> None:
    """Raises unless arguments of a trainer are those of a `YaPOTrainer`.

    Raises:
        ConfigError: `args` is another trainer's.
        UnsupportedOperationError: There is a reference model.
    """
    if args is not None and not isinstance(args, YaPOTrainingConfig):
        raise ConfigError(f"args is a {type(args).__name__}: YaPOTrainer takes a YaPOTrainingConfig.")
    if args is not None:
        _warn_of_small_rate(args)
    if ref_model is not None:
        raise UnsupportedOperationError("ref_model is not supported: the reference is the same model without steering.")


def require_adapter(model: Any, peft_config: PeftConfig | None) -> None:
    """Raises unless there is a YaPO adapter to train.

    Raises:
        ConfigError: There is none, it is frozen, another method's adapter would be trained too, or `peft_config` is for
            another method.
    """
    if isinstance(model, nn.Module):
        _require_no_other(model)
    if peft_config is not None:
        if not isinstance(peft_config, YaPOConfig):
            raise ConfigError(f"peft_config is a {type(peft_config).__name__}: YaPOTrainer trains a YaPOConfig.")
        require_adding(peft_config, "default", "YaPOTrainer")
        return
    layers = steered_layers(model) if isinstance(model, PeftModel) else []
    if not layers:
        raise ConfigError(
            "There is no YaPO adapter to train: give peft_config=YaPOConfig(...), or a PeftModel that has one."
        )
    names = {name for layer in layers for name in layer.active_adapters if name in layer.yapo_code}
    for name in names:
        require_adding(cast(Any, model).peft_config[name], name, "YaPOTrainer")
    active = [layer.yapo_code[name] for layer in layers for name in names if name in layer.yapo_code]
    if not any(code.requires_grad for code in active):
        raise ConfigError(
            "The model's YaPO adapter is frozen: load it with is_trainable=True, or activate a trainable one."
        )


def require_one_trace() -> None:
    """Raises under ZeRO-3, which expects the same calls of the model's layers in each pass.

    Raises:
        UnsupportedOperationError: Passes over neutral text would come between those over pairs.
    """
    if is_deepspeed_zero3_enabled():
        raise UnsupportedOperationError(
            "max_kl and max_features are not supported with ZeRO-3: set max_kl=None, or use ZeRO-2 or FSDP2."
        )


def _require_no_other(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer) or isinstance(module, YaPOLayer):
            continue
        if any(parameter.requires_grad for parameter in cast(nn.Module, module).parameters()):
            raise ConfigError(
                f"{name!r} ({type(module).__name__}) holds another method's trainable adapter, which would be trained "
                "with the code and change the reference: freeze it with requires_grad_(False), or merge it first."
            )


def non_finite_loss(loss: float, state: TrainerState, args: TrainingArguments) -> NonFiniteLossError:
    """The error of a loss that is not finite; it names the last checkpoint."""
    output_dir = cast(str, args.output_dir)
    last = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
    kept = f"The codes before it are in {last!r}." if last else "There is no checkpoint from before it."
    return NonFiniteLossError(
        f"The loss is {loss} in step {state.global_step + 1}. {kept} Lower learning_rate (now {args.learning_rate}) or "
        "train in float32 if the model overflows."
    )
