"""Training of codes with few non-zero entries."""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import DPOTrainer

from ..errors import ConfigError, UnsupportedOperationError
from ..sae import FrozenSAE
from ..steering.reach import keep_largest
from ..tuner import YaPOLayer
from .config import YaPOTrainingConfig
from .units import trained_codes


def feature_budget(args: YaPOTrainingConfig, progress: float, size: int) -> int | None:
    """The maximum number of non-zero entries at a point of the training; None for no limit.

    From `sparsify_start` on, the budget decreases from all entries by the same factor in each step, and reaches
    `max_features` at `sparsify_end`.

    Args:
        args: The training config.
        progress: Fraction of the training steps that are done, in [0, 1].
        size: Number of entries of the codes, including zeros.
    """
    if args.max_features is None or progress < args.sparsify_start:
        return None
    target = min(args.max_features, size)
    if progress >= args.sparsify_end:
        return target
    remaining = (args.sparsify_end - progress) / (args.sparsify_end - args.sparsify_start)
    return round(target * (size / target) ** remaining)


class Sparsify(TrainerCallback):
    """After each optimizer step, shrinks codes by `l1` and zeroes the entries that exceed their budget.

    A zeroed entry still gets a gradient where its feature is active, and returns if it outgrows the smallest entry that
    was kept. The codes are the only state, so that a resumed training continues as if it had not stopped.
    """

    def __init__(self, layers: list[YaPOLayer]) -> None:
        self._layers = layers

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Changes the codes in place."""
        config = cast(YaPOTrainingConfig, args)
        trained = trained_codes(self._layers)
        codes = [layer.yapo_code[name].data for layer, name in trained]
        if config.l1:
            rates = {id(p): group["lr"] for group in kwargs["optimizer"].param_groups for p in group["params"]}
            for (layer, name), code in zip(trained, codes, strict=True):
                shrink = config.l1 * rates[id(layer.yapo_code[name])]
                code.copy_(code.sign() * (code.abs() - shrink).clamp(min=0))
        budget = feature_budget(config, (state.global_step + 1) / state.max_steps, sum(map(len, codes)))
        if budget is not None:
            saes = [cast(FrozenSAE, layer.yapo_sae[name]) for layer, name in trained]
            for code, sparse in zip(codes, keep_largest(codes, saes, budget), strict=True):
                code.copy_(sparse)


def require_sparsifiable(trainer: DPOTrainer, layers: list[YaPOLayer]) -> None:
    """Raises if codes cannot be made sparse during training.

    Raises:
        ConfigError: An adapter is dense.
        UnsupportedOperationError: The codes are sharded.
    """
    dense = [name for layer, name in trained_codes(layers) if layer.yapo_sae[name] is None]
    if dense:
        raise ConfigError(
            f"max_features and l1 need codes over an SAE's features; adapter {dense[0]!r} has space='dense'."
        )
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise UnsupportedOperationError(
            "max_features and l1 are not supported with DeepSpeed or FSDP, which shard codes: use DDP, or prune the "
            "trained adapter with yapo_peft.methods.prune."
        )
