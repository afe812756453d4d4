"""An adapter's steering as one vector per layer, which is all that most other programs can add."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
    """What an adapter adds at one multiplier, as a vector per layer.

    Attributes:
        multiplier: The multiplier; it is in the vectors.
        vectors: By the layer's index, `(d_model,)` in float32 on the CPU.
        reason: Why a constant is only an approximation; None where it is exact.
        lowered: Share of the code's entries that are lowered at this multiplier, and so depend on the token.
        clipped: Of what these ask for, the share that the calibration tokens do not have to give: 1 if their features
            are never on. None without calibration.
        kl: KL(steered || constant) of the next token in nats, the mean over calibration tokens. None without
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
        """Whether adding the vectors is the adapter's steering, on every token."""
        return self.reason is None

    def verdict(self) -> str:
        """How exact it is, in a sentence."""
        if self.reason is None:
            return f"Exact at multiplier {self.multiplier:g}."
        measured = f"KL {self.kl:.4g} nats per token from the true steering, over {self.tokens} tokens"
        share = "" if self.clipped is None else f"; {100 * self.clipped:.0f} % of what is lowered is clipped"
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
    """Finds the vectors that steer as an adapter does, or the best ones for some text.

    It is exact where the same is added to every token: for dense adapters, and for codes that lower no feature at this
    multiplier. Elsewhere each layer's vector is the mean of what the adapter adds there on the calibration texts,
    without
    their first tokens, which are attention sinks; and how far that is from the adapter is measured on the same texts.

    Args:
        model: A `PeftModel` with a YaPO adapter. It is not changed.
        multiplier: The multiplier.
        texts: For calibration: texts, messages, or rows, as `contexts` takes them; of the kind that will be steered.
        tokenizer: The model's; found by the model's name if None.
        adapter_name: The adapter; the active one if None.
        batch_size: Texts per forward pass.
        max_length: Tokens of a text that are read.

    Raises:
        ConfigError: There is no such adapter, the multiplier is zero, or texts are needed and there are none.
        DatasetError: A text is none.
    """
    name, config, layers = adapter_of(model, adapter_name)
    require_multiplier(multiplier)
    require_enabled(model)
    reason = next((found for layer in layers if (found := token_dependence(layer, name, multiplier))), None)
    entries = torch.cat([layer.code(name).detach().cpu() for layer in layers])
    lowered = 0.0
    if config.space == "sae" and entries.any():
        lowered = float((multiplier * entries < 0).sum()) / int(entries.count_nonzero())
    if reason is None:
        vectors = {layer.index: full_shift(layer, name, multiplier).cpu() for layer in layers}
        return ConstantSteering(multiplier, vectors, None, lowered, None, None, 0)
    if texts is None:
        raise ConfigError(f"At multiplier={multiplier:g} no constant is exact, as {reason}: give texts= to fit one on.")
    require_texts(texts)
    tokenizer = tokenizer_of(model, tokenizer)
    batches = [batch for batch in text_batches(texts, tokenizer, batch_size, max_length, model) if any(batch)]
    device, dtype = device_and_dtype(model)
    with torch.no_grad(), evaluating(model):
        vectors, clipped = _fitted(model, layers, name, multiplier, batches, tokenizer, device, dtype)
        kl, tokens = _kl(model, layers, name, multiplier, vectors, batches, tokenizer, device)
    return ConstantSteering(
        multiplier, {index: vector.cpu() for index, vector in vectors.items()}, reason, lowered, clipped, kl, tokens
    )


def _fitted(
    model: Any,
    layers: Sequence[YaPOLayer],
    name: str,
    multiplier: float,
    batches: list[list[list[int]]],
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[dict[int, Tensor], float | None]:
    """The mean shift at each layer, and the share of what is lowered that there was nothing to take from."""
    total: dict[int, Tensor] = {}
    count, asked, given = 0, 0.0, 0.0
    lowering = {layer.index: _lowered(layer, name, multiplier, device, dtype) for layer in layers}
    outputs: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(index: int) -> Callable[[Tensor, Tensor], Tensor]:
        def kept(before: Tensor, after: Tensor) -> Tensor:
            outputs[index] = before, after
            return after

        return kept

    for batch in tqdm(batches, desc="Fitting a constant", unit="batch"):
        inputs = padded(batch, tokenizer, device)
        counted = inputs["attention_mask"].bool()
        counted[:, 0] = False
        with steering(model, multiplier, name), changed_outputs((layer, keep(layer.index)) for layer in layers):
            model.get_base_model().base_model(**inputs, use_cache=False)
        for index, (before, after) in outputs.items():
            total[index] = total.get(index, 0) + (after - before)[counted].float().sum(dim=0)
            part = lowering[index]
            if part is not None:
                wanted, taken = _asked_and_given(part, multiplier, before[counted])
                asked, given = asked + wanted, given + taken
        count += int(counted.sum())
    if not count:
        raise ConfigError("The texts have no token after the first one of each: give longer ones.")
    return {index: vector / count for index, vector in total.items()}, (1 - given / asked if asked else None)


def _lowered(layer: YaPOLayer, name: str, multiplier: float, device: torch.device, dtype: torch.dtype) -> Parts | None:
    """The features that a code lowers at a layer; None if there are none."""
    part = Parts.of(layer, name, device, dtype)
    lowered = part.only((multiplier * part.entries < 0).nonzero().squeeze(-1))
    return lowered if part.sae is not None and len(lowered) else None


def _asked_and_given(part: Parts, multiplier: float, h: Tensor) -> tuple[float, float]:
    """How far lowered features are asked to move tokens, `(n, d_model)`, and how far they can; in lengths, summed."""
    wanted, lengths = -multiplier * part.entries, part.rows.norm(dim=1)
    taken = torch.minimum(part.on(h[None])[0][0], wanted) * lengths
    return float((wanted * lengths).sum()) * len(h), float(taken.sum())


def _kl(
    model: Any,
    layers: Sequence[YaPOLayer],
    name: str,
    multiplier: float,
    vectors: dict[int, Tensor],
    batches: list[list[list[int]]],
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
) -> tuple[float, int]:
    """Mean KL(steered || constant) of the next token, and over how many tokens."""
    total, count = 0.0, 0
    for batch in tqdm(batches, desc="Measuring", unit="batch"):
        inputs = padded(batch, tokenizer, device)
        with steering(model, multiplier, name):
            steered = model(**inputs, use_cache=False).logits
        with steering(model, 0.0), adding(layers, vectors):
            constant = model(**inputs, use_cache=False).logits
        for own, other, mask in zip(steered, constant, inputs["attention_mask"].bool(), strict=True):
            own, other = own[mask].float().log_softmax(-1), other[mask].float().log_softmax(-1)
            total += float(nn.functional.kl_div(other, own, log_target=True, reduction="sum"))
            count += int(mask.sum())
    return total / count, count


@contextmanager
def adding(layers: Sequence[YaPOLayer], vectors: dict[int, Tensor]) -> Generator[None]:
    """Adds a vector to the output of each layer, at every token."""

    def add(vector: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda before, after: after + vector.to(after.device, after.dtype)

    with changed_outputs((layer, add(vectors[layer.index])) for layer in layers):
        yield
