"""What the trainer asks of the adapter that it is given."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME
from torch import nn
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from ..errors import ConfigError, UnsupportedOperationError
from ..tuner import YaPOConfig, YaPOLayer
from ..tuner.adapters import steered_layers


@contextmanager
def no_reference_adapter(model: Any) -> Generator[None]:
    """Keeps TRL from adding a frozen copy of a ready adapter, named "ref": steering off is the reference.

    TRL reads `peft_config["default"]`, calls `add_adapter("ref", ...)`, and copies parameters of any adapter "default"
    to those of "ref"; all three are answered without effect.
    """
    if not isinstance(model, PeftModel):
        yield
        return
    alias = "default" not in model.peft_config
    if alias:
        model.peft_config["default"] = model.peft_config[model.active_adapters[0]]
    model.__dict__["add_adapter"] = lambda *args, **kwargs: None
    model.__dict__["get_parameter"] = lambda name: nn.Module.get_parameter(model, name.replace(".ref.", ".default."))
    try:
        yield
    finally:
        del model.__dict__["add_adapter"], model.__dict__["get_parameter"]
        if alias:
            del model.peft_config["default"]


def require_adapter(model: Any, peft_config: PeftConfig | None) -> None:
    """Raises unless there is a YaPO adapter to train.

    Raises:
        ConfigError: There is none, it is frozen, another method's adapter would train along, or `peft_config` is
            another method's.
    """
    if isinstance(model, nn.Module):
        _require_no_other(model)
    if peft_config is not None:
        if not isinstance(peft_config, YaPOConfig):
            raise ConfigError(f"peft_config is a {type(peft_config).__name__}: YaPOTrainer trains a YaPOConfig.")
        return
    layers = steered_layers(model) if isinstance(model, PeftModel) else []
    if not layers:
        raise ConfigError(
            "There is no YaPO adapter to train: give peft_config=YaPOConfig(...), or a PeftModel that has one."
        )
    if not any(_is_trainable(layer) for layer in layers):
        raise ConfigError(
            "The model's YaPO adapter is frozen: load it with is_trainable=True, or activate a trainable one."
        )


def require_cacheable(trainer: DPOTrainer) -> None:
    """Raises where the upper half of a model cannot be trained alone, before anything is computed.

    Raises:
        UnsupportedOperationError: The trainer's setting needs the lower blocks, or another way to call the model.
    """
    settings = {
        "FSDP": trainer.is_fsdp_enabled,
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "a vision dataset": trainer._is_vision_dataset,
        "torch_compile": trainer.args.torch_compile,
        "a load-balancing loss (router_aux_loss_coef)": trainer.aux_loss_enabled,
        "a data_collator of one's own": not isinstance(trainer.data_collator, DataCollatorForPreference),
    }
    found = [name for name, is_set in settings.items() if is_set]
    if found:
        raise UnsupportedOperationError(f"cache_activations=True does not work with {found[0]}: train without either.")


def require_same_adapters(model: nn.Module, folder: Path) -> None:
    """Raises unless the adapters of a checkpoint steer as those of the model do.

    Raises:
        AdapterFileError: A file is truncated.
        ConfigError: An adapter steers other tokens.
    """
    for name, config in cast(dict[str, Any], getattr(model, "peft_config", {})).items():
        place = folder if name == "default" else folder / name
        if not isinstance(config, YaPOConfig) or not (place / CONFIG_NAME).is_file():
            continue
        saved = cast(YaPOConfig, YaPOConfig.from_pretrained(str(place)))
        if saved.positions != config.positions:
            raise ConfigError(
                f"The checkpoint {str(folder)!r} was trained with positions={saved.positions!r}, and this run has "
                f"positions={config.positions!r}: give the same to go on from it."
            )


def _require_no_other(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer) or isinstance(module, YaPOLayer):
            continue
        if any(parameter.requires_grad for parameter in cast(nn.Module, module).parameters()):
            raise ConfigError(
                f"{name!r} ({type(module).__name__}) holds another method's trainable adapter, which would learn along "
                "with the code, in the reference too: freeze it with requires_grad_(False), or merge it first."
            )


def _is_trainable(layer: YaPOLayer) -> bool:
    return any(layer.yapo_code[name].requires_grad for name in layer.active_adapters if name in layer.yapo_code)
