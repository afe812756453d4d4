"""Learning rates in units of typical activations, so that one rate suits SAEs and layers of any scale."""

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
from trl import DPOConfig, DPOTrainer

from .._utils import device_of, evaluating
from ..errors import ConfigError, UnsupportedOperationError
from ..sae import FrozenSAE
from ..scoring.pairs import padded_answers
from ..steering.learning import ActiveFeatures
from ..tuner import YaPOLayer, steering
from ..tuner.hooks import block_outputs

# Optimizers whose steps do not grow with the gradient, by the prefix of transformers' names.
_NORMALIZED = ("adam", "ademamix", "lion")
_EXAMPLES, _TOKENS = 16, 512
_RAW = "use learning_rate_unit='raw', with a learning rate in units of the SAE's activations"

# The unit of each code, by layer and adapter.
Units = dict[tuple[int, str], float]


def measure_units(trainer: DPOTrainer, base: Any, layers: list[YaPOLayer]) -> Units:
    """Measures the typical activation of each trained code on the first training examples, without steering.

    For an SAE that is the mean activation of a token's active features, for a dense vector the root mean square of a
    token's activations; both as the median over tokens, which a few tokens of extreme norm do not change.

    Args:
        trainer: The trainer, whose training set TRL has tokenized.
        base: The causal language model in its model.
        layers: The steered layers.

    Returns:
        A positive number for each trained code, as measured by the first process.

    Raises:
        ConfigError: No feature of an SAE is active on any token.
        UnsupportedOperationError: The dataset is not tokenized, or the optimizer cannot train in these units.
    """
    _require_measurable(trainer)
    # Before training, FSDP can leave all processes but the first without weights.
    measured = _measured(trainer, base, layers) if PartialState().is_main_process else {}
    units: Units = broadcast_object_list([measured])[0]
    listed = ", ".join(f"{unit:.3g} at layer {layer} ({name})" for (layer, name), unit in units.items())
    trainer.accelerator.print(f"The learning rate is in units of typical activations: {listed}. Logs have the product.")
    return units


def _measured(trainer: DPOTrainer, base: Any, layers: list[YaPOLayer]) -> Units:
    found: dict[tuple[int, str], list[Tensor]] = {}
    model = cast(nn.Module, trainer.model)
    device = device_of(model)
    longest = min(_TOKENS, cast(DPOConfig, trainer.args).max_length or _TOKENS)
    with evaluating(model):
        for row in islice(cast(Iterable[Any], trainer.train_dataset), _EXAMPLES):
            if "prompt_ids" not in row:
                raise UnsupportedOperationError(
                    f"Activations are measured on tokens, and the dataset has {sorted(row)}: {_RAW}."
                )
            batch = padded_answers([((row["prompt_ids"] + row["chosen_ids"])[:longest], [])], 0)
            inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
            with torch.no_grad(), steering(model, 0.0), block_outputs(layers) as outputs:
                base.base_model(**inputs, use_cache=False)
            for layer, name in trained_codes(layers):
                sizes = _sizes_of_tokens(outputs[layer.index][0], layer.yapo_sae[name])
                found.setdefault((layer.index, name), []).append(sizes.cpu())
    units = {key: float(torch.cat(sizes).nanmedian()) for key, sizes in found.items()}
    for (layer, _), unit in units.items():
        if not 0 < unit < float("inf"):
            raise ConfigError(
                f"No feature of the SAE at layer {layer} is active in the first {_EXAMPLES} examples (typical "
                f"activation {unit}): is it an SAE of this model and layer? If so, use learning_rate_unit='raw'."
            )
    return units


def in_units(optimizer: Optimizer, layers: Iterable[YaPOLayer], units: Units) -> None:
    """Moves each code to a parameter group of its own, so that it is trained in its unit.

    If steps do not depend on the gradient's size, this is equivalent to training `code / unit` at the given learning
    rate: the rate is multiplied by the unit, epsilon and weight decay are divided by it.

    Raises:
        UnsupportedOperationError: A code is in none of the optimizer's groups.
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
            "The optimizer holds flattened or sharded copies of the codes, which cannot have a rate each: use "
            "learning_rate_unit='raw'."
        )
    optimizer.param_groups[:] = groups


@contextmanager
def gradients_in_units(layers: Iterable[YaPOLayer], units: Units) -> Generator[None]:
    """Scales gradients to those of `code / unit` while they are clipped.

    DeepSpeed clips on its own and does not see this.
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


def _require_measurable(trainer: DPOTrainer) -> None:
    optim = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    plugin: Any = trainer.accelerator.state.deepspeed_plugin
    reason = None
    if not optim.removeprefix("paged_").startswith(_NORMALIZED) or trainer.optimizer_cls_and_kwargs is not None:
        reason = f"optim={optim!r} is not known to take steps whose size does not depend on the gradient's"
    elif plugin is not None and "optimizer" in plugin.deepspeed_config:
        reason = "DeepSpeed's own optimizer has a single learning rate"
    elif is_deepspeed_zero3_enabled():
        reason = "ZeRO-3 shards the model before training"
    if reason is not None:
        raise UnsupportedOperationError(f"{reason}: {_RAW}.")


def trained_codes(layers: Iterable[YaPOLayer]) -> list[tuple[YaPOLayer, str]]:
    """The layer and the adapter name of each trained code."""
    return [(layer, name) for layer in layers for name, code in layer.yapo_code.items() if code.requires_grad]


def _sizes_of_tokens(hidden: Tensor, sae: FrozenSAE | None) -> Tensor:
    """Each token's typical activation, `(tokens,)`; NaN where no feature is active."""
    if sae is None:
        return hidden.float().square().mean(dim=-1).sqrt()
    active = ActiveFeatures.of(hidden, sae.weights(hidden.device, hidden.dtype))
    total = torch.zeros(len(hidden), device=hidden.device).index_add_(0, active.token, active.value.float())
    return total / torch.bincount(active.token, minlength=len(hidden))
