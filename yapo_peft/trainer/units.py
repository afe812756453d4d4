"""How large activations are where codes steer, so that one learning rate suits SAEs and layers of any scale."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from itertools import islice
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl import DPOTrainer

from .._utils import evaluating
from ..errors import ConfigError, UnsupportedOperationError
from ..sae import FrozenSAE
from ..scoring.pairs import padded_answers
from ..steering.learning import ActiveFeatures
from ..tuner import YaPOLayer, steering
from ..tuner.hooks import block_outputs

# Optimizers whose steps do not grow with the gradient, by the start of transformers' names.
_NORMALISED = ("adam", "ademamix", "lion")
_EXAMPLES, _TOKENS = 16, 512

# The unit of each code, by layer and adapter.
Units = dict[tuple[int, str], float]


def measure_units(
    model: nn.Module, base: Any, layers: list[YaPOLayer], dataset: Iterable[Any], max_length: int | None
) -> Units:
    """The typical activation of what each code is about, from the first examples of a dataset, unsteered.

    Of an SAE that is the mean activation of a token's active features, of a dense vector the root mean square of a
    token's activations; and of that the median over tokens, which a few tokens of an extreme norm do not move.

    Args:
        model: The model with its adapter.
        base: The causal language model in it.
        layers: Its steered layers.
        dataset: As TRL tokenises it.
        max_length: How many tokens of an example are trained on.

    Returns:
        A positive number for each code that is trained; what the first process measured, in all of them.

    Raises:
        ConfigError: No feature of an SAE is on in any token.
        UnsupportedOperationError: The dataset is not of tokens.
    """
    # Only the first process is sure to have the weights before training: FSDP can leave the others without.
    units = _measured(model, base, layers, dataset, max_length) if PartialState().is_main_process else {}
    return broadcast_object_list([units])[0]


def _measured(
    model: nn.Module, base: Any, layers: list[YaPOLayer], dataset: Iterable[Any], max_length: int | None
) -> Units:
    found: dict[tuple[int, str], list[Tensor]] = {}
    device = next(p.device for p in model.parameters() if not p.is_meta)
    with evaluating(model):
        for row in islice(dataset, _EXAMPLES):
            if "prompt_ids" not in row:
                raise UnsupportedOperationError(
                    f"Activations are measured on tokens, and the dataset has {sorted(row)}: give "
                    "learning_rate_unit='raw', and a rate in units of the SAE's activations."
                )
            tokens = (row["prompt_ids"] + row["chosen_ids"])[: min(_TOKENS, max_length or _TOKENS)]
            batch = padded_answers([(tokens, [])], 0)
            inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
            with torch.no_grad(), steering(model, 0.0), block_outputs(layers) as outputs:
                base.base_model(**inputs, use_cache=False)
            for layer, name in trained_codes(layers):
                sizes = _sizes_of_tokens(outputs[layer.index][0], layer.yapo_sae[name])
                found.setdefault((layer.index, name), []).append(sizes.cpu())
    return {key: _median(key, torch.cat(sizes)) for key, sizes in found.items()}


def in_units(optimizer: Optimizer, layers: Iterable[YaPOLayer], units: Units) -> None:
    """Gives each code a group of its own in an optimizer, as if the code were counted in its unit.

    For a step that does not depend on the gradient's size, that is the same as training `code / unit` at the learning
    rate that was asked for: the rate is multiplied by the unit, epsilon and weight decay are divided by it.

    Raises:
        UnsupportedOperationError: The optimizer has no group with a code in it.
    """
    unit_of = {id(layer.yapo_code[name]): units[layer.index, name] for layer, name in trained_codes(layers)}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        own = [parameter for parameter in group["params"] if id(parameter) in unit_of]
        rest = [parameter for parameter in group["params"] if id(parameter) not in unit_of]
        if rest:
            groups.append({**group, "params": rest})
        for parameter in own:
            unit = unit_of.pop(id(parameter))
            scaled = {name: group[name] / unit for name in ("weight_decay", "eps") if name in group}
            groups.append({**group, **scaled, "lr": group["lr"] * unit, "params": [parameter]})
    if unit_of:
        raise UnsupportedOperationError(
            "The optimizer holds codes in pieces of its own, which cannot have a rate each: give "
            "learning_rate_unit='raw'."
        )
    optimizer.param_groups[:] = groups


@contextmanager
def gradients_in_units(layers: Iterable[YaPOLayer], units: Units) -> Generator[None]:
    """Within it, gradients are those of codes counted in their units, so that clipping does not depend on these.

    DeepSpeed clips by itself, and so by the gradients as they are.
    """
    keys = [(layer, name) for layer, name in trained_codes(layers) if (layer.index, name) in units]
    codes = [(layer.yapo_code[name], units[layer.index, name]) for layer, name in keys]
    codes = [(code, unit) for code, unit in codes if code.grad is not None]
    for code, unit in codes:
        cast(Tensor, code.grad).mul_(unit)
    try:
        yield
    finally:
        for code, unit in codes:
            cast(Tensor, code.grad).div_(unit)


def require_measurable(trainer: DPOTrainer) -> None:
    """Raises unless the steps of a run's optimizer can be measured in units of activations.

    Raises:
        UnsupportedOperationError: It is another optimizer, or the weights are in parts before training.
    """
    args = trainer.args
    optim = str(getattr(args.optim, "value", args.optim))
    plugin: Any = trainer.accelerator.state.deepspeed_plugin
    reasons = {
        f"optim={optim!r} is not known to take steps whose size does not depend on the gradient's": (
            not optim.startswith(_NORMALISED) or trainer.optimizer_cls_and_kwargs is not None
        ),
        "DeepSpeed's own optimizer has one rate for all": plugin is not None and "optimizer" in plugin.deepspeed_config,
        "ZeRO-3 has the model in parts before training": is_deepspeed_zero3_enabled(),
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise UnsupportedOperationError(
            f"{found[0]}: give learning_rate_unit='raw', and a rate in units of the SAE's activations."
        )


def trained_codes(layers: Iterable[YaPOLayer]) -> list[tuple[YaPOLayer, str]]:
    """The codes that are trained, as their layer and the name of their adapter."""
    return [(layer, name) for layer in layers for name, code in layer.yapo_code.items() if code.requires_grad]


def _sizes_of_tokens(hidden: Tensor, sae: FrozenSAE | None) -> Tensor:
    """A token's typical activation, `(tokens,)`, of those where there is one."""
    if sae is None:
        return hidden.float().square().mean(dim=-1).sqrt()
    active = ActiveFeatures.of(hidden, sae.weights(hidden.device, hidden.dtype))
    total = torch.zeros(len(hidden), device=hidden.device).index_add_(0, active.token, active.value.float())
    count = torch.bincount(active.token, minlength=len(hidden))
    return total[count > 0] / count[count > 0]


def _median(key: tuple[int, str], sizes: Tensor) -> float:
    unit = float(sizes.median()) if len(sizes) else 0.0
    if not 0 < unit < float("inf"):
        raise ConfigError(
            f"No feature of the SAE at layer {key[0]} is on in the first {_EXAMPLES} examples (typical activation "
            f"{unit}): is it an SAE of this model and layer? If so, give learning_rate_unit='raw'."
        )
    return unit
