"""Starts codes on chosen features."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .._utils import evaluating, mixed_seed
from ..errors import NonFiniteLossError
from ..scoring.neutral import NeutralText
from ..steering.learning import ActiveFeatures
from ..steering.selection import Metric, select_features
from ..tuner import YaPOLayer
from ..tuner.adapters import write_code
from ..tuner.hooks import block_outputs, changed_outputs
from ..tuner.positions import tokens_to_steer
from .budget import limited
from .config import YaPOTrainingConfig
from .units import trained_codes

# Training examples that are read.
_EXAMPLES = 128
# Rows of neutral text that the damage is estimated from, and how many run at once.
_ROWS, _BATCH = 128, 4
# How close the divergence comes to the bound.
_TOLERANCE = 0.1
# Divergence at which codes start without a bound, in nats per token, and features without `max_features`.
_START, _FEATURES = 0.1, 512
# Rows of the decoder that are held at once.
_CHUNK = 16384


class StartOnFeatures(TrainerCallback):
    """Gives codes that are zero when training begins the entries that lower the loss most for their damage.

    They are found by a linear model at zero, and are the same in all processes. Features that are not active on any of
    the examples get no entry. A dense vector gets the best shift, of which codes get the best approximation by
    `max_features` features, or by 512. Codes and vectors that are trained together stay zero.

    Args:
        layers: The steered layers.
        text: The neutral text that damage is measured on.
        dataset: The training set, of which the first examples are read.
        gradients: Computes the gradients of the losses of examples at multipliers +1 and -1 with respect to shifts,
            `(d,)` each, while only a context steers.
    """

    def __init__(
        self,
        layers: list[YaPOLayer],
        text: NeutralText,
        dataset: Iterable[Any],
        gradients: Callable[[list[Any], list[Tensor], AbstractContextManager[None]], list[Tensor]],
    ) -> None:
        self._layers, self._text, self._dataset, self._gradients = layers, text, dataset, gradients

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Writes the codes, whose damage is at most a tenth above the bound.

        Raises:
            NonFiniteLossError: A gradient is not finite.
        """
        options, layers = cast(YaPOTrainingConfig, args), trained_codes(self._layers)
        are_dense = {layer.yapo_sae[name] is None for layer, name in layers}
        are_zero = not any(bool(layer.yapo_code[name].any()) for layer, name in layers)
        if state.global_step > 0 or not are_zero or len(are_dense) > 1:
            return
        self._text.model.train()
        bound = options.max_kl or _START
        given = self._text, self._dataset, self._gradients, options
        decoders, gains, metric, active = measure_directions(layers, *given)
        if not (gains.isfinite().all() and metric.factor.isfinite().all()):
            raise NonFiniteLossError(
                "A gradient of the unsteered model is NaN or infinite, on a pair or on neutral text: train in float32 "
                "or bfloat16 if the model overflows."
            )
        if are_dense == {True}:
            shift = metric.solve(gains[0] - gains[1])
            shift *= (2 * bound / metric.energies(shift).clamp(min=1e-12)) ** 0.5
            codes = shift.split([decoder.d_in for decoder in decoders])
        else:
            codes = chosen_codes(decoders, gains, metric, active, options.max_features or _FEATURES, bound)
        for (layer, name), code in zip(layers, codes, strict=True):
            write_code(layer, name, code)
        with evaluating(self._text.model):
            limited(layers, self._text, bound, tolerance=_TOLERANCE)


def measure_directions(
    layers: list[tuple[YaPOLayer, str]],
    text: NeutralText,
    dataset: Iterable[Any],
    gradients: Callable[[list[Any], list[Tensor], AbstractContextManager[None]], list[Tensor]],
    args: YaPOTrainingConfig,
) -> tuple[list[Decoder], Tensor, Metric, list[Tensor]]:
    """The first arguments of `chosen_codes`, measured on codes that are zero; decoders have no rows if dense."""
    examples, size = list(islice(dataset, _EXAMPLES)), args.per_device_train_batch_size
    saes = [layer.yapo_sae[name] for layer, name in layers]
    codes = [layer.yapo_code[name] for layer, name in layers]
    device = codes[0].device
    decoders = [
        Decoder(code.new_zeros(0, len(code)) if sae is None else sae.decoder(device, text.model.dtype))
        for sae, code in zip(saes, codes, strict=True)
    ]
    widths = [decoder.d_in for decoder in decoders]
    active = [torch.zeros(decoder.d_sae, dtype=torch.bool, device=device) for decoder in decoders]
    gains = torch.zeros(2, sum(widths), device=device)
    for start in tqdm(range(0, len(examples), size), desc="Measuring the gain of directions"):
        batch = examples[start : start + size]
        shifts = [torch.zeros(1, 1, width, device=device, requires_grad=True) for width in widths]
        with block_outputs(layer for layer, _ in layers) as outputs:
            found = gradients(batch, shifts, shifted(layers, shifts))
        for gain, gradient in zip(gains, found, strict=True):
            gain -= len(batch) * gradient
        for (layer, _), sae, seen in zip(layers, saes, active, strict=True):
            if sae is not None:
                hidden = outputs[layer.index].detach()
                on = ActiveFeatures.of(hidden, sae.weights(hidden.device, hidden.dtype))
                seen[on.feature.to(device)] = True
    return decoders, gains, damage_metric(layers, widths, text, args.seed), active


def gradients_of_both(losses: list[Tensor], log_probs: Tensor, shifts: list[Tensor]) -> list[Tensor]:
    """Gradients of both directions' losses with respect to shifts, `(d,)` each.

    Where a loss depends on the difference to the reference only, as most do, one is the other's negative at the zero
    code, and the model is passed through once.

    Args:
        losses: The losses at +1 and -1.
        log_probs: The log-probabilities that they were computed from.
        shifts: The shifts that those depend on, `(..., d_model)` each.
    """
    plus, minus = (torch.autograd.grad(loss, log_probs, retain_graph=True)[0] for loss in losses)
    are_opposite = torch.allclose(plus, -minus, rtol=1e-3, atol=1e-6 * float(plus.abs().max().nan_to_num()))
    found: list[Tensor] = []
    for gradient in (plus,) if are_opposite else (plus, minus):
        parts = torch.autograd.grad(log_probs, shifts, gradient, retain_graph=True)
        found.append(torch.cat(parts, dim=-1).flatten())
    return [found[0], -found[0]] if are_opposite else found


@contextmanager
def shifted(layers: list[tuple[YaPOLayer, str]], shifts: list[Tensor]) -> Generator[None]:
    """Adds a vector to the output of each layer, at the tokens that an adapter steers.

    Args:
        layers: The layers, and the adapter on each.
        shifts: The vector of each layer: `(1, 1, d_model)` for all rows, or `(rows, 1, d_model)`.
    """

    def change(layer: YaPOLayer, name: str, shift: Tensor, before: Tensor, after: Tensor) -> Tensor:
        mask = tokens_to_steer(layer.positions[name], after, layer.call)
        shift = shift.to(after)
        return after + (shift if mask is None else shift * mask[..., None])

    with changed_outputs(
        (layer, lambda before, after, of=(layer, name, shift): change(*of, before, after))
        for (layer, name), shift in zip(layers, shifts, strict=True)
    ):
        yield


def damage_metric(layers: list[tuple[YaPOLayer, str]], widths: list[int], text: NeutralText, seed: int) -> Metric:
    """Second derivative of the divergence on neutral text with respect to shifts of the layers, `(d, d)`.

    It is the Fisher information, estimated from gradients of sampled log-likelihoods.
    """
    found: list[Tensor] = []
    device = layers[0][0].yapo_code[layers[0][1]].device
    rows = min(_ROWS, len(text))
    for start in tqdm(range(0, rows, _BATCH), desc="Measuring the damage of directions"):
        chosen = range(start, min(start + _BATCH, rows))
        shifts = [torch.zeros(len(chosen), 1, width, device=device, requires_grad=True) for width in widths]
        with shifted(layers, shifts):
            likelihood = text.sampled_log_likelihood(chosen, mixed_seed(seed, start)).sum()
        found.append(torch.cat(torch.autograd.grad(likelihood, shifts), dim=-1).squeeze(1))
    return Metric.of(torch.cat(found).float())


def chosen_codes(
    decoders: list[Decoder], gains: Tensor, metric: Metric, active: list[Tensor], k: int, kl: float
) -> list[Tensor]:
    """Codes with at most `k` entries that gain most for their damage by a linear model, half of them per direction.

    Args:
        decoders: The decoder of each layer's SAE.
        gains: Gradient of the gain with respect to the layers' shifts at multipliers +1 and -1, `(2, d)`.
        metric: The damage of shifts, `(d, d)`.
        active: Which features of each layer may be chosen, `(d_sae,)`.
        k: Number of entries over all layers.
        kl: Divergence of the codes at both multipliers by the quadratic model, in nats per token.
    """
    sizes = [decoder.d_sae for decoder in decoders]
    ends = torch.tensor([decoder.d_in for decoder in decoders]).cumsum(0).tolist()
    parts = [slice(end - decoder.d_in, end) for end, decoder in zip(ends, decoders, strict=True)]
    layer_of = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    feature_of = torch.cat([torch.arange(size) for size in sizes])

    def products(vector: Tensor) -> Tensor:
        return torch.cat([decoder.products(vector[part]) for decoder, part in zip(decoders, parts, strict=True)])

    def rows(indices: Tensor) -> Tensor:
        found = gains.new_zeros(len(indices), gains.shape[1])
        for row, index in zip(found, indices.tolist(), strict=True):
            layer = int(layer_of[index])
            row[parts[layer]] = decoders[layer].row(int(feature_of[index]))
        return found

    layers = zip(decoders, parts, active, strict=True)
    energies = torch.cat([d.energies(metric, part).masked_fill(~on, torch.inf) for d, part, on in layers])
    code = gains.new_zeros(sum(sizes))
    for sign, gain, count in zip((1, -1), gains, (k - k // 2, k // 2), strict=True):
        chosen, weights = select_features(gain, metric, products, energies, rows, count)
        if len(chosen):
            shift = weights @ rows(chosen)
            code[chosen] = sign * weights * (2 * kl / metric.energies(shift)) ** 0.5
            energies[chosen] = torch.inf
    return list(code.split(sizes))


class Decoder:
    """The decoder of an SAE, `(d_sae, d_in)`, computed with in float32 in parts that fit in memory."""

    def __init__(self, W_dec: Tensor) -> None:
        self._W_dec = W_dec
        self.d_sae, self.d_in = W_dec.shape

    def row(self, feature: int) -> Tensor:
        """A feature's row, `(d_in,)`."""
        return self._W_dec[feature].float()

    def products(self, vector: Tensor) -> Tensor:
        """The product of each row with a vector, `(d_sae,)`."""
        return torch.cat([rows.float() @ vector for rows in self._W_dec.split(_CHUNK)])

    def energies(self, metric: Metric, part: slice) -> Tensor:
        """`w @ metric @ w` of each row `w`, which shifts a part of the dimensions, `(d_sae,)`."""
        return torch.cat([metric.energies(rows.float(), part) for rows in self._W_dec.split(_CHUNK)])
