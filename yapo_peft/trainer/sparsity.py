"""Training of codes with few non-zero entries."""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import DPOTrainer

from ..errors import ConfigError, UnsupportedOperationError
from ..tuner import YaPOLayer
from .checks import is_sharded
from .units import trained_codes

# The key of the features' indices in a trainer's state.
_NAME = "Support"


class KeepSupport(TrainerCallback):
    """Keeps the entries that codes have when training begins, or had in the checkpoint, and all others at zero.

    Args:
        layers: The steered layers.
        max_features: The maximum number of entries; None for any, which only checks that a checkpoint had none either.
    """

    def __init__(self, layers: list[YaPOLayer], max_features: int | None) -> None:
        self._layers, self._max_features = layers, max_features
        self._handles: list[Any] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Masks the gradients of all other entries.

        Raises:
            ConfigError: The checkpoint was trained with another `max_features`, or the codes have no entry.
        """
        kept = cast(dict[str, Any], state.stateful_callbacks)
        was = kept.get(_NAME, {}).get("max_features")
        if state.global_step > 0 and was != self._max_features:
            raise ConfigError(
                f"max_features={self._max_features}, and the checkpoint was trained with max_features={was}: resume "
                "with that, or start a new run."
            )
        if self._max_features is None:
            return
        codes = [layer.yapo_code[name] for layer, name in trained_codes(self._layers)]
        if _NAME not in kept:
            support = [code.detach().nonzero().squeeze(-1).tolist() for code in codes]
            if not any(support):
                raise ConfigError(
                    f"max_features={self._max_features}: no feature that is active on the first pairs changes how much "
                    "likelier the chosen answer is. Do the answers differ, and does the adapter steer tokens of them?"
                )
            kept[_NAME] = {"max_features": self._max_features, "features": support}
        self._release()  # of a run that failed
        for code, support in zip(codes, kept[_NAME]["features"], strict=True):
            outside = torch.ones_like(code, dtype=torch.bool)
            outside[support] = False
            self._handles.append(code.register_hook(lambda gradient, mask=outside: gradient.masked_fill(mask, 0)))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Removes the masks."""
        self._release()

    def _release(self) -> None:
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
    if is_sharded(trainer):
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
