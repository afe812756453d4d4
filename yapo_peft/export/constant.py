"""An adapter's steering as one vector per block, which is all that most other programs can add."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError
from ..interpret.checks import require_strength
from ..interpret.texts import device_and_dtype, padded, require_texts, text_batches, tokenizer_of
from ..methods.adapters import adapter_of
from ..modes import evaluating
from ..tuner import YaPOLayer, steering
from ..tuner.blocks import hidden_states, with_hidden_states
from ..tuner.strength import require_enabled


@dataclass(frozen=True)
class ConstantSteering:
    """What an adapter adds at one strength, as a vector per block.

    Attributes:
        multiplier: The strength; it is in the vectors.
        vectors: By the block's index, `(d_model,)` in float32 on the CPU.
        reason: Why a constant is only an approximation; None where it is exact.
        lowered: Share of the code's entries that are lowered at this strength, and so depend on the token.
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
    strength. Elsewhere each block's vector is the mean of what the adapter adds there on the calibration texts, without
    their first tokens, which are attention sinks; and how far that is from the adapter is measured on the same texts.

    Args:
        model: A `PeftModel` with a YaPO adapter. It is not changed.
        multiplier: The strength.
        texts: For calibration: texts, messages, or rows, as `contexts` takes them; of the kind that will be steered.
        tokenizer: The model's; found by the model's name if None.
        adapter_name: The adapter; the active one if None.
        batch_size: Texts per forward pass.
        max_length: Tokens of a text that are read.

    Raises:
        ConfigError: There is no such adapter, the strength is zero, or texts are needed and there are none.
        DatasetError: A text is none.
    """
    name, config, layers = adapter_of(model, adapter_name)
    require_strength(multiplier)
    require_enabled(model)
    reason = _reason(layers, name, config.positions, multiplier)
    entries = torch.cat([layer.code(name).detach().cpu() for layer in layers])
    lowered = 0.0
    if config.space == "sae" and entries.any():
        lowered = float((multiplier * entries < 0).sum()) / int(entries.count_nonzero())
    if reason is None:
        vectors = {layer.index: _raised(layer, name, multiplier).cpu() for layer in layers}
        return ConstantSteering(multiplier, vectors, None, lowered, None, None, 0)
    if texts is None:
        raise ConfigError(f"At multiplier={multiplier:g} no constant is exact, as {reason}: give texts= to fit one on.")
    require_texts(texts)
    tokenizer = tokenizer_of(model, tokenizer)
    batches = [batch for batch in text_batches(texts, tokenizer, batch_size, max_length, model) if any(batch)]
    device, _ = device_and_dtype(model)
    with torch.no_grad(), evaluating(model):
        vectors, clipped = _fitted(model, layers, name, multiplier, batches, tokenizer, device)
        kl, tokens = _kl(model, layers, name, multiplier, vectors, batches, tokenizer, device)
    return ConstantSteering(
        multiplier, {index: vector.cpu() for index, vector in vectors.items()}, reason, lowered, clipped, kl, tokens
    )


def _reason(layers: Sequence[YaPOLayer], name: str, positions: str, multiplier: float) -> str | None:
    """Why no constant is the same as an adapter, if so."""
    if positions != "all":
        return f"it steers only the tokens of positions={positions!r}"
    for layer in layers:
        sae = layer.yapo_sae[name]
        if sae is None:
            continue
        if sae.normalization != "none":
            return f"its SAE scales each token by itself ({sae.normalization!r})"
        cut = int((multiplier * layer.code(name).detach() < 0).sum())
        if cut:
            return f"it lowers {cut} features of block {layer.index}, each by no more than it is on at a token"
    return None


def _raised(layer: YaPOLayer, name: str, multiplier: float) -> Tensor:
    """What the raised entries of a code add, `(d_model,)`; a dense vector as a whole."""
    wanted, sae = multiplier * layer.code(name).detach().float(), layer.yapo_sae[name]
    if sae is None:
        return wanted
    raised = (wanted > 0).nonzero().squeeze(-1)
    return wanted[raised] @ sae.decoder_rows(raised, wanted.device, torch.float32)


def _fitted(
    model: Any,
    layers: Sequence[YaPOLayer],
    name: str,
    multiplier: float,
    batches: list[list[list[int]]],
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
) -> tuple[dict[int, Tensor], float | None]:
    """The mean shift at each block, and the share of what is lowered that there was nothing to take from."""
    total: dict[int, Tensor] = {}
    count, asked, given = 0, 0.0, 0.0
    lowering = {layer.index: _Lowered(layer, name, multiplier, device) for layer in layers if layer.yapo_sae[name]}
    for batch in tqdm(batches, desc="Fitting a constant", unit="batch"):
        inputs = padded(batch, tokenizer, device)
        counted = inputs["attention_mask"].bool()
        counted[:, 0] = False
        with steering(model, multiplier, name), _shifts(layers) as shifts:
            model.get_base_model().base_model(**inputs, use_cache=False)
        for index, (before, shift) in shifts.items():
            total[index] = total.get(index, 0) + shift[counted].float().sum(dim=0)
            if index in lowering:
                wanted, taken = lowering[index].of(before[counted])
                asked, given = asked + wanted, given + taken
        count += int(counted.sum())
    if not count:
        raise ConfigError("The texts have no token after the first one of each: give longer ones.")
    return {index: vector / count for index, vector in total.items()}, (1 - given / asked if asked else None)


class _Lowered:
    """The features that a code lowers at a block."""

    def __init__(self, layer: YaPOLayer, name: str, multiplier: float, device: torch.device) -> None:
        wanted, sae = multiplier * layer.code(name).detach().to(device), layer.yapo_sae[name]
        assert sae is not None
        features = (wanted < 0).nonzero().squeeze(-1)
        self._wanted = -wanted[features]
        self._lengths = sae.decoder_rows(features, device, torch.float32).norm(dim=1)
        self._select = lambda dtype: sae.select(features, device, dtype)

    def of(self, h: Tensor) -> tuple[float, float]:
        """How far they are asked to move tokens, `(n, d_model)`, and how far they can; in lengths, summed."""
        on = self._select(h.dtype).encode(h[None])[0][0].float()
        taken = torch.minimum(on, self._wanted) * self._lengths
        return float((self._wanted * self._lengths).sum()) * len(h), float(taken.sum())


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
def _shifts(layers: Sequence[YaPOLayer]) -> Generator[dict[int, tuple[Tensor, Tensor]]]:
    """Within it, what each block put out before steering, and what steering added, are kept."""
    before: dict[int, Tensor] = {}
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            before[index] = hidden_states(output)

        return hook

    def compare(index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[index] = before[index], hidden_states(output) - before[index]

        return hook

    hooks = [(layer, keep(layer.index), True) for layer in layers]
    hooks += [(layer, compare(layer.index), False) for layer in layers]
    with _hooked(hooks):
        yield found


@contextmanager
def adding(layers: Sequence[YaPOLayer], vectors: dict[int, Tensor]) -> Generator[None]:
    """Within it, each block puts out its vector on top, at every token."""

    def add(vector: Tensor) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            h = hidden_states(output)
            return with_hidden_states(output, h + vector.to(h.device, h.dtype))

        return hook

    with _hooked([(layer, add(vectors[layer.index]), False) for layer in layers]):
        yield


@contextmanager
def _hooked(hooks: list[tuple[YaPOLayer, Any, bool]]) -> Generator[None]:
    handles = [layer.block.register_forward_hook(hook, prepend=first) for layer, hook, first in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
