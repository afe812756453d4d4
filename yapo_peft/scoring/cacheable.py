"""What must hold for the upper half of a model to be trained alone."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from trl.models.utils import disable_gradient_checkpointing

from ..errors import UnsupportedOperationError
from ..sae import FrozenSAE
from ..tuner import YaPOLayer
from ..tuner.layer import is_code
from .packing import PackedBatch
from .scorer import score_packed


def require_constant(model: PeftModel) -> None:
    """Raises unless the blocks below the codes put out the same in every step.

    Raises:
        UnsupportedOperationError: Something else is trained, or dropped at random.
    """
    others = [n for n, p in model.named_parameters() if p.requires_grad and not is_code(n)]
    if others:
        raise UnsupportedOperationError(
            f"cache_activations=True holds the model below the lowest steered block constant, but {others[0]!r} is "
            "trained as well: freeze it, or train without the cache."
        )
    dropout = [name for name, module in model.named_modules() if isinstance(module, nn.Dropout) and module.p > 0]
    if dropout:
        raise UnsupportedOperationError(
            f"cache_activations=True needs the same activations in every epoch, but {dropout[0]!r} drops some at "
            "random: leave disable_dropout=True, or train without the cache."
        )


def one_sae(layer: YaPOLayer) -> FrozenSAE | None:
    """The SAE of a layer's active adapters; None if they are dense.

    Raises:
        UnsupportedOperationError: They have several.
    """
    found = [layer.yapo_sae[name] for name in layer.active_adapters if name in layer.yapo_sae]
    saes = {id(sae): sae for sae in found if sae is not None}
    if len(saes) > 1:
        raise UnsupportedOperationError(
            f"cache_activations=True stores the features of one SAE, but the active adapters of layer {layer.index} "
            "have several: activate one of them, or train without the cache."
        )
    return next(iter(saes.values()), None)


def require_no_noise(model: PeftModel, base: Any, sample: PackedBatch, expected: Tensor, checkpointing: Any) -> None:
    """Raises if the model gives other log-probabilities in training mode.

    Args:
        model: The model as it is called, in evaluation mode.
        base: The causal language model in it.
        sample: Some pairs.
        expected: The log-probabilities of their answers.
        checkpointing: The run's `gradient_checkpointing_kwargs`.

    Raises:
        UnsupportedOperationError: They differ.
    """
    model.train()
    with disable_gradient_checkpointing(cast(Any, model), checkpointing):
        trained = score_packed(base, model, sample).log_probs
    model.eval()
    if not torch.allclose(trained, expected, rtol=1e-4, atol=1e-4):
        raise UnsupportedOperationError(
            f"cache_activations=True needs the same activations in every epoch, but {type(base).__name__} adds noise "
            "in training mode (dropout, layer drop or router jitter): set it to 0 in the model's config, or train "
            "without the cache."
        )
