"""Chooses the features of a code before training, and starts it on them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .._utils import evaluating, mixed_seed
from ..sae import FrozenSAE
from ..scoring.neutral import NeutralText
from ..steering.learning import ActiveFeatures
from ..steering.selection import select_features
from ..tuner import YaPOLayer
from ..tuner.adapters import write_code
from ..tuner.hooks import block_outputs, changed_outputs
from ..tuner.positions import tokens_to_steer
from .budget import limited
from .config import YaPOTrainingConfig
from .units import trained_codes

# Training examples that are read.
_EXAMPLES = 256
# Rows of neutral text that the damage is estimated from, and how many run at once.
_ROWS, _BATCH = 128, 2
# Divergence at which codes start without a bound, in nats per token.
_START = 0.1
# How much the estimate of the damage is shrunk at least: few or equal rows seem to have no error.
_SHARE = 0.01
# Rows of the decoder that are held at once.
_CHUNK = 16384


def start_on_features(
    steered: list[YaPOLayer],
    text: NeutralText | None,
    dataset: Iterable[Any],
    gradients: Callable[[list[Any], list[Tensor], AbstractContextManager[None]], list[Tensor]],
    args: YaPOTrainingConfig,
) -> None:
    """Gives codes the `max_features` entries that lower the loss most for their damage, by a linear model at zero.

    The codes, the same in all processes, are within the bound of the damage. Features that are not active on any of the
    examples get no entry.

    Args:
        steered: The steered layers.
        text: The neutral text that damage is measured on.
        dataset: The training set, of which the first examples are read.
        gradients: Computes the gradients of the losses of examples at multipliers +1 and -1 with respect to shifts,
            `(d,)` each, while only a context steers.
        args: The training config.
    """
    assert text is not None
    text.model.train()
    layers = trained_codes(steered)
    examples, size = list(islice(dataset, _EXAMPLES)), args.per_device_train_batch_size
    saes = [cast(FrozenSAE, layer.yapo_sae[name]) for layer, name in layers]
    device = layers[0][0].yapo_code[layers[0][1]].device
    decoders = [Decoder(sae.decoder(device, sae.dtype)) for sae in saes]
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
            hidden = outputs[layer.index].detach()
            seen[ActiveFeatures.of(hidden, sae.weights(hidden.device, hidden.dtype)).feature] = True
    metric = damage_metric(layers, widths, text, args.seed)
    bound = args.max_kl or _START
    codes = chosen_codes(decoders, gains, metric, active, cast(int, args.max_features), bound)
    for (layer, name), code in zip(layers, codes, strict=True):
        write_code(layer, name, code)
    with evaluating(text.model):
        limited(layers, text, bound)


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
    are_opposite = torch.allclose(plus, -minus, rtol=1e-3, atol=1e-6 * float(plus.abs().max()))
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
        return after + (shift if mask is None else shift * mask[..., None]).to(after)

    with changed_outputs(
        (layer, lambda before, after, of=(layer, name, shift): change(*of, before, after))
        for (layer, name), shift in zip(layers, shifts, strict=True)
    ):
        yield


def damage_metric(layers: list[tuple[YaPOLayer, str]], widths: list[int], text: NeutralText, seed: int) -> Tensor:
    """Second derivative of the divergence on neutral text with respect to shifts of the layers, `(d, d)`.

    It is the Fisher information, estimated from gradients of sampled log-likelihoods, and shrunk towards a multiple of
    the identity by the intensity that minimises the expected error, because there are fewer rows than dimensions.

    Source: Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", 2004.
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
    return _shrunk(torch.cat(found).float())


def _shrunk(samples: Tensor) -> Tensor:
    """The second moment of samples, `(n, d)`, shrunk as by Ledoit and Wolf."""
    n, d = samples.shape
    moment = samples.T @ samples / n
    scale = moment.diagonal().mean()
    identity = torch.eye(d, device=samples.device)
    distance = (moment - scale * identity).square().sum()
    # The sum over samples of the squared distance of `x x^T` from the moment.
    noise = (samples.square().sum(dim=1).square().sum() - n * moment.square().sum()) / n**2
    share = float((noise / distance).clamp(_SHARE, 1)) if distance > 0 else 1.0
    return (1 - share) * moment + share * scale * identity


def chosen_codes(
    decoders: list[Decoder], gains: Iterable[Tensor], metric: Tensor, active: list[Tensor], k: int, kl: float
) -> list[Tensor]:
    """Codes with at most `k` entries that gain most for their damage by a linear model, half of them per direction.

    Args:
        decoders: The decoder of each layer's SAE.
        gains: Gradient of the gain with respect to the layers' shifts at multiplier +1, `(d,)`, and at -1.
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
        found = metric.new_zeros(len(indices), len(metric))
        for row, index in zip(found, indices.tolist(), strict=True):
            layer = int(layer_of[index])
            row[parts[layer]] = decoders[layer].row(int(feature_of[index]))
        return found

    pairs = zip(decoders, parts, active, strict=True)
    energies = torch.cat([d.energies(metric[part, part]).masked_fill(~on, torch.inf) for d, part, on in pairs])
    code = metric.new_zeros(sum(sizes))
    for sign, gain, count in zip((1, -1), gains, (k - k // 2, k // 2), strict=True):
        chosen, weights = select_features(gain, metric, products, energies, rows, count)
        if len(chosen):
            shift = weights @ rows(chosen)
            code[chosen] = sign * weights * (2 * kl / (shift @ metric @ shift)) ** 0.5
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

    def energies(self, metric: Tensor) -> Tensor:
        """`w @ metric @ w` of each row `w`, `(d_sae,)`."""
        return torch.cat([((rows @ metric) * rows).sum(dim=1) for rows in map(Tensor.float, self._W_dec.split(_CHUNK))])
