"""Training of codes with few non-zero entries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import DPOTrainer

from ..errors import ConfigError, UnsupportedOperationError
from ..tuner import YaPOLayer
from ..tuner.adapters import write_code
from .units import trained_codes

# The key of the features' indices in a trainer's state.
_NAME = "Support"


class KeepSupport(TrainerCallback):
    """Chooses the features of the codes when training begins, and keeps all other entries at zero.

    A run that starts from codes with entries keeps those, and a resumed one those of its checkpoint.

    Args:
        layers: The steered layers.
        choose: Computes the codes to start from, one per trained code.
    """

    def __init__(self, layers: list[YaPOLayer], choose: Callable[[], list[Tensor]]) -> None:
        self._layers, self._choose = layers, choose
        self._handles: list[Any] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Chooses the features, and masks the gradients of all others."""
        codes = [(layer, name, layer.yapo_code[name]) for layer, name in trained_codes(self._layers)]
        kept = cast(dict[str, Any], state.stateful_callbacks)
        if _NAME not in kept:
            if not any(bool(code.any()) for _, _, code in codes):
                for (layer, name, _), start in zip(codes, self._choose(), strict=True):
                    write_code(layer, name, start)
            kept[_NAME] = [code.detach().nonzero().squeeze(-1).tolist() for _, _, code in codes]
        for (_, _, code), support in zip(codes, kept[_NAME], strict=True):
            outside = torch.ones_like(code, dtype=torch.bool)
            outside[support] = False
            self._handles.append(code.register_hook(lambda gradient, mask=outside: gradient.masked_fill(mask, 0)))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Removes the masks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def require_sparsifiable(trainer: DPOTrainer, layers: list[YaPOLayer], max_features: int) -> None:
    """Raises if codes cannot be trained with few entries.

    Raises:
        ConfigError: An adapter is dense, or its codes have more entries already.
        UnsupportedOperationError: The codes are sharded.
    """
    trained = trained_codes(layers)
    dense = [name for layer, name in trained if layer.yapo_sae[name] is None]
    if dense:
        raise ConfigError(f"max_features needs codes over an SAE's features; adapter {dense[0]!r} has space='dense'.")
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise UnsupportedOperationError(
            "max_features is not supported with DeepSpeed or FSDP, which shard codes: use DDP, or prune the trained "
            "adapter with yapo_peft.methods.prune."
        )
    entries = sum(int(layer.yapo_code[name].count_nonzero()) for layer, name in trained)
    if entries > max_features:
        raise ConfigError(
            f"max_features={max_features}, and the codes to train have {entries} entries: start from a new adapter "
            f"(init_weights=True), or keep the largest with yapo_peft.methods.prune(model, {max_features})."
        )
