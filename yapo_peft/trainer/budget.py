"""A budget for the damage of steering: a bound on the divergence from the unsteered model on neutral text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from .._utils import evaluating
from ..scoring.calibration import scaled_to
from ..scoring.neutral import NeutralText
from ..tuner import YaPOLayer
from ..tuner.adapters import write_codes
from .units import trained_codes

# The key of the weights in a trainer's state, and their first value.
_NAME, _FIRST = "DamageBudget", 0.3
# How much the logarithm of a weight grows in a step at twice the bound or more, and how much it falls at most.
_RATE = 0.2
# Rows of the text on which the damage of a trained code is measured.
_ROWS = 32


class DamageBudget:
    """Adds weighted divergences to a loss, with weights that keep each of them at a bound.

    The weights are the Lagrange multipliers of the bounds, found by dual ascent: with each batch, the logarithm of a
    weight grows by the relative excess of its divergence over the bound, or falls by what is left of the bound.

    Args:
        text: The neutral text.
        max_kl: The bound on the divergence at multipliers +1 and -1, in nats per token.
    """

    def __init__(self, text: NeutralText, max_kl: float) -> None:
        self._text, self._max_kl = text, max_kl

    def penalty(
        self, model: Callable[..., Any], number: int, state: dict[str, Any], accelerator: Accelerator
    ) -> tuple[Tensor, dict[str, float]]:
        """What is added to the loss of a batch, and metrics to log.

        Args:
            model: The model as it is called in training.
            number: Number of the global batch, which chooses two rows of the text, the same in all processes.
            state: What checkpoints keep; the weights of the next batch are written to it.
            accelerator: The run's.
        """
        divergences = self._text.divergence(model, [2 * number, 2 * number + 1], torch.tensor([1.0, -1.0]))
        # Processes differ by rounding.
        found = cast(Tensor, accelerator.reduce(divergences.detach(), "mean")).tolist()
        weights = state.get(_NAME, [_FIRST, _FIRST])
        excess = [min(max(divergence / self._max_kl - 1, -1.0), 1.0) for divergence in found]
        state[_NAME] = [weight * math.exp(_RATE * over) for weight, over in zip(weights, excess, strict=True)]
        metrics = {"kl/plus": found[0], "kl/minus": found[1]}
        metrics |= {"kl_weight/plus": weights[0], "kl_weight/minus": weights[1]}
        return divergences @ torch.tensor(weights, device=divergences.device), metrics


def limit_damage(layers: list[YaPOLayer], text: NeutralText, max_kl: float) -> None:
    """Scales trained codes whose divergence exceeds the bound, and records the divergences in the adapters' configs."""
    trained = trained_codes(layers)
    for name in {name for _, name in trained}:
        own = [layer for layer, other in trained if other == name]
        with evaluating(text.model):
            damage = scaled_to(own, name, text.start(_ROWS), max_kl, at_most=True)
        # Processes differ by rounding; all take the codes of the first.
        codes = broadcast_object_list([[layer.yapo_code[name].detach() for layer in own]])[0]
        write_codes(text.model, name, own, codes)
        text.model.peft_config[name].damage = broadcast_object_list([damage])[0]
