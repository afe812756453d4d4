"""Expresses steering as one vector per layer, the only form that most other programs support."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .._utils import evaluating
from ..errors import ConfigError
from ..interpret.checks import require_multiplier
from ..interpret.parts import Parts
from ..interpret.texts import device_and_dtype, padded, require_texts, text_batches, tokenizer_of
from ..tuner import YaPOLayer, steering
from ..tuner.adapters import adapter_of, require_enabled
from ..tuner.hooks import changed_outputs
from ..tuner.merging import full_shift, token_dependence


@dataclass(frozen=True)
class ConstantSteering:
    """An adapter's steering at one multiplier, as one vector per layer.

    Attributes:
        multiplier: The multiplier, which the vectors include.
        vectors: The vector of each layer, by index, `(d_model,)` in float32 on the CPU.
        reason: Why constant vectors are only an approximation; None if they are exact.
        lowered: Fraction of the code's nonzero entries that lower their feature at this multiplier, so that their
            effect depends on the token.
        clipped: Fraction of the lowering that clipping at zero prevents, over the calibration tokens: 1 if the features
            are never active there. None without calibration.
        kl: KL(steered || constant) of the next token in nats, averaged over the calibration tokens. None without
            calibration.
        tokens: Number of calibration tokens.
    """

    multiplier: float
    vectors: dict[int, Tensor]
    reason: str | None
    lowered: float
    clipped: float | None
    kl: float | None
    tokens: int

    @property
    def is_exact(self) -> bool:
        """Whether adding the vectors equals the adapter's steering at every token."""
        return self.reason is None

    def verdict(self) -> str:
        """Describes in a sentence how exact the vectors are."""
        if self.reason is None:
            return f"Exact at multiplier {self.multiplier:g}."
        measured = f"KL {self.kl:.4g} nats per token from the adapter's steering, over {self.tokens} tokens"
        share = "" if self.clipped is None else f"; {100 * self.clipped:.0f} % of the lowering is clipped"
        return f"Approximate at multiplier {self.multiplier:g}: {self.reason}. {measured}{share}."


def constant_steering(
    model: nn.Module,
    multiplier: float = 1.0,
    texts: Iterable[Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    adapter_name: str | None = None,
    batch_size: int = 8,
    max_length: int = 256,
) -> ConstantSteering:
    """Computes the vectors that equal an adapter's steering, or approximate it on calibration texts.

    They are exact if the shift is the same at every token: for dense adapters, and for codes that lower no feature at
    this multiplier. Otherwise, each layer's vector is the adapter's mean shift on the calibration texts, without their
    first tokens (attention sinks), and the KL from the adapter's steering is measured on the same texts.

    Args:
        model: A `PeftModel` with a YaPO adapter; left unchanged.
        multiplier: The multiplier.
        texts: Calibration texts, similar to those that will be steered: texts, messages or rows, as for `contexts`.
        tokenizer: The model's tokenizer; loaded by the model's name if None.
        adapter_name: The adapter; the active one if None.
        batch_size: Texts per forward pass.
        max_length: Maximum number of tokens per text; longer texts are truncated.

    Raises:
        ConfigError: The adapter does not exist, the multiplier is zero, or calibration texts are needed and missing.
        DatasetError: A calibration text is not a text, messages or a row.
    """
    name, config, layers = adapter_of(model, adapter_name)
    require_multiplier(multiplier)
    require_enabled(model)
    reason = next((found for layer in layers if (found := token_dependence(layer, name, multiplier))), None)
    entries = torch.cat([layer.code(name).detach().cpu() for layer in layers])
    lowered = 0.0
    if config.space == "sae" and config.mode == "add" and entries.any():
        lowered = float((multiplier * entries < 0).sum()) / int(entries.count_nonzero())
    if reason is None:
        vectors = {layer.index: full_shift(layer, name, multiplier).cpu() for layer in layers}
        return ConstantSteering(multiplier, vectors, None, lowered, None, None, 0)
    if texts is None:
        raise ConfigError(
            f"At multiplier={multiplier:g}, constant vectors are only an approximation, because {reason}: pass "
            "texts= (--text) to fit and measure them."
        )
    require_texts(texts)
    tokenizer = tokenizer_of(model, tokenizer)
    batches = [batch for batch in text_batches(texts, tokenizer, batch_size, max_length, model) if any(batch)]
    with torch.no_grad(), evaluating(model):
        vectors, clipped = _mean_shifts(model, layers, name, multiplier, batches, tokenizer)
        kl, tokens = _measured_kl(model, layers, name, multiplier, vectors, batches, tokenizer)
    return ConstantSteering(
        multiplier, {index: vector.cpu() for index, vector in vectors.items()}, reason, lowered, clipped, kl, tokens
    )


def _mean_shifts(
    model: Any,
    layers: Sequence[YaPOLayer],
    name: str,
    multiplier: float,
    batches: list[list[list[int]]],
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[dict[int, Tensor], float | None]:
    """The mean shift at each layer, and the fraction of the lowering that is clipped."""
    device, dtype = device_and_dtype(model)
    total: dict[int, Tensor] = {}
    count, wanted, possible = 0, 0.0, 0.0
    lowered = {layer.index: _lowered(layer, name, multiplier, device, dtype) for layer in layers}
    outputs: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(index: int, before: Tensor, after: Tensor) -> Tensor:
        outputs[index] = before, after
        return after

    for batch in tqdm(batches, desc="Fitting vectors", unit="batch"):
        inputs = padded(batch, tokenizer, device)
        counted = inputs["attention_mask"].bool()
        counted[:, 0] = False
        keeping = changed_outputs((layer, partial(keep, layer.index)) for layer in layers)
        with steering(model, multiplier, name), keeping:
            model.get_base_model().base_model(**inputs, use_cache=False)
        for index, (before, after) in outputs.items():
            total[index] = total.get(index, 0) + (after - before)[counted].float().sum(dim=0)
            if (parts := lowered[index]) is not None:
                distances = _distances(parts, multiplier, before[counted])
                wanted, possible = wanted + distances[0], possible + distances[1]
        count += int(counted.sum())
    if not count:
        raise ConfigError("The calibration texts have one token each, and first tokens are not read: pass longer ones.")
    return {index: vector / count for index, vector in total.items()}, (1 - possible / wanted if wanted else None)


def _lowered(layer: YaPOLayer, name: str, multiplier: float, device: torch.device, dtype: torch.dtype) -> Parts | None:
    """The features that a code lowers at a layer; None if it lowers none, or holds them at values."""
    parts = Parts.of(layer, name, device, dtype)
    if parts.clamps:
        return None
    lowered = parts.only((multiplier * parts.entries < 0).nonzero().squeeze(-1))
    return lowered if parts.sae is not None and len(lowered) else None


def _distances(lowered: Parts, multiplier: float, h: Tensor) -> tuple[float, float]:
    """How far lowered features would move tokens, `(n, d_model)`, without and with clipping, summed over both."""
    wanted, norms = -multiplier * lowered.entries, lowered.rows.norm(dim=1)
    possible = torch.minimum(lowered.on(h[None])[0][0], wanted)
    return float((wanted * norms).sum()) * len(h), float((possible * norms).sum())


def _measured_kl(
    model: Any,
    layers: Sequence[YaPOLayer],
    name: str,
    multiplier: float,
    vectors: dict[int, Tensor],
    batches: list[list[list[int]]],
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[float, int]:
    """The mean KL(steered || constant) of the next token, and the number of tokens."""
    device, _ = device_and_dtype(model)
    total, count = 0.0, 0
    for batch in tqdm(batches, desc="Measuring KL", unit="batch"):
        inputs = padded(batch, tokenizer, device)
        with steering(model, multiplier, name):
            steered = model(**inputs, use_cache=False).logits
        with steering(model, 0.0), adding(layers, vectors):
            constant = model(**inputs, use_cache=False).logits
        # Row by row, because log-probabilities of a whole batch take much memory.
        for p, q, mask in zip(steered, constant, inputs["attention_mask"].bool(), strict=True):
            p, q = p[mask].float().log_softmax(-1), q[mask].float().log_softmax(-1)
            total += float(nn.functional.kl_div(q, p, log_target=True, reduction="sum"))
            count += int(mask.sum())
    return total / count, count


@contextmanager
def adding(layers: Sequence[YaPOLayer], vectors: dict[int, Tensor]) -> Generator[None]:
    """Adds each layer's vector to its output, at every token."""

    def add(vector: Tensor, before: Tensor, after: Tensor) -> Tensor:
        return after + vector.to(after)

    with changed_outputs((layer, partial(add, vectors[layer.index])) for layer in layers):
        yield
