"""A budget for the damage of steering: a bound on the divergence from the unsteered model on neutral text."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from trl import DPOTrainer

from .._utils import evaluating
from ..errors import ConfigError
from ..scoring.calibration import TOLERANCE, measured, scaled_to
from ..scoring.neutral import NeutralText, neutral_rows
from ..scoring.upper_half import UpperHalf
from ..tuner import YaPOLayer
from ..tuner.adapters import record_damage, write_code
from ..tuner.layer import lowest_steered
from .checks import is_sharded, require_one_trace
from .config import YaPOTrainingConfig
from .units import trained_codes

# The key of what is kept in a trainer's state, and the first multiplier of both bounds.
_NAME, _FIRST = "DamageBound", 0.3
# How much the logarithm of a multiplier grows in a step at twice the bound or more, and how much it falls at most.
_RATE = 0.1
# How much of the average divergence is that of the last batch.
_RECENT = 0.2
# Tokens of a row that are read before and in training.
TRAINING_TOKENS = 64
# Rows of the text on which the damage of a trained code is measured.
_ROWS = 32


def neutral_text(trainer: DPOTrainer, layers: list[YaPOLayer], dataset: Any, upper_only: bool) -> NeutralText | None:
    """The text that a trainer measures damage on; None if it does not.

    Args:
        trainer: The trainer.
        layers: The steered layers.
        dataset: The text; the package's own if None.
        upper_only: Whether to run only the layers above the lowest steered one.

    Raises:
        ConfigError: A text is given, and nothing reads it.
        DatasetError: The text is empty, or lacks its columns.
        UnsupportedOperationError: DeepSpeed's ZeRO-3 is used, which does not allow other passes within a step.
    """
    args = cast(YaPOTrainingConfig, trainer.args)
    if args.max_kl is None and args.max_features is None:
        if dataset is not None:
            raise ConfigError("neutral_dataset is only read with max_kl or max_features: set one, or leave it out.")
        return None
    require_one_trace()
    tokenizer: Any = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    lowest = lowest_steered(layers) if upper_only else None
    model: Any = trainer.model
    upper = None if lowest is None else UpperHalf(model.get_base_model(), lowest.index)
    # Sharded weights are gathered in each call, so all processes must make the same calls.
    keep = not is_sharded(trainer)
    return NeutralText(model, neutral_rows(dataset, tokenizer), trainer.accelerator.device, upper, keep)


class DamageBudget:
    """Adds weighted divergences to a loss, with weights that keep each of them at a bound.

    A weight is the Lagrange multiplier of its bound, found by dual ascent, times the ratio of the divergence to the
    bound, averaged over the last batches. With each batch, the logarithm of the multiplier grows by the relative excess
    of the divergence over the bound, or falls by what is left of the bound. That alone overshoots; the ratio responds
    at once (proportional-integral control, as in arXiv 2007.03964).

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
            number: Number of the global batch, which chooses a row of the text, the same in all processes.
            state: What checkpoints keep, to which the numbers for the next batch are written.
            accelerator: The run's.
        """
        divergences = self._text.divergence(model, [number, number], torch.tensor([1.0, -1.0]))
        # Processes differ by rounding.
        found = cast(Tensor, accelerator.reduce(divergences.detach(), "mean")).tolist()
        ratios = [divergence / self._max_kl for divergence in found]
        multipliers, averages = state.get(_NAME, ([_FIRST, _FIRST], ratios))
        averages = [old + _RECENT * (new - old) for old, new in zip(averages, ratios, strict=True)]
        weights = [multiplier * average for multiplier, average in zip(multipliers, averages, strict=True)]
        growth = [math.exp(_RATE * min(ratio - 1, 1.0)) for ratio in ratios]
        state[_NAME] = [one * by for one, by in zip(multipliers, growth, strict=True)], averages
        metrics = {"kl/plus": found[0], "kl/minus": found[1]}
        metrics |= {"kl_weight/plus": weights[0], "kl_weight/minus": weights[1]}
        return divergences @ torch.tensor(weights, device=divergences.device), metrics


def limit_damage(layers: list[YaPOLayer], text: NeutralText, max_kl: float) -> bool:
    """Scales trained codes whose divergence exceeds the bound, and records each adapter's in its config.

    If other adapters are active too, it is the sum of all that is bounded.

    Returns:
        Whether a code has changed.
    """
    trained = trained_codes(layers)
    before = [layer.code(name).detach().clone() for layer, name in trained]
    with evaluating(text.model):
        damage = limited(trained, text, max_kl)
        if not max(damage.values()) <= max_kl * 1.1:
            warnings.warn(
                f"max_kl={max_kl}: the divergence is {damage['plus']:.3g} nats per token at multiplier +1 and "
                f"{damage['minus']:.3g} at -1, which no smaller scale of the trained codes brings down: are other "
                "adapters active, or does the text hardly depend on the codes?",
                stacklevel=2,
            )
        active = {name for layer in layers for name in layer.active_adapters if name in layer.yapo_code}
        for name in dict.fromkeys(name for _, name in trained):
            own = damage if active == {name} else measured(text.start(_ROWS, name))
            steered = [layer for layer in layers if name in layer.yapo_code]
            record_damage(text.model, name, steered, broadcast_object_list([own])[0])
    return not all(torch.equal(layer.code(name), code) for (layer, name), code in zip(trained, before, strict=True))


def limited(
    codes: list[tuple[YaPOLayer, str]], text: NeutralText, max_kl: float, tolerance: float = TOLERANCE
) -> dict[str, float]:
    """Scales codes in place, the same in all processes, until their divergence is within the bound; returns it."""
    found = scaled_to(codes, text.start(_ROWS), max_kl, at_most=True, tolerance=tolerance)
    # Processes differ by rounding; all take the codes of the first.
    first: list[Any] = [[layer.code(name).detach().cpu() for layer, name in codes], found]
    broadcast_object_list(first)
    for (layer, name), code in zip(codes, first[0], strict=True):
        write_code(layer, name, code)
    return first[1]
