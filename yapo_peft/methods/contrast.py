"""Statistics of the activations and SAE features of chosen and rejected answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .._utils import choice, device_of, evaluating
from ..errors import ConfigError
from ..sae import FrozenSAE
from ..scoring.checks import longest, require_length
from ..scoring.pairs import pair_batches, special_tokens
from ..steering.learning import ActiveFeatures
from ..tuner import YaPOLayer
from ..tuner.adapters import steered_layers, unsteered_outputs

AnswerTokens = Literal["completion", "last"]


@dataclass
class FeatureStatistics:
    """Feature statistics of one SAE, over the chosen or the rejected answers.

    Attributes:
        total: Each feature's activation, summed over answers, `(d_sae,)` in float32.
        active: Number of answers in which each feature is active, `(d_sae,)`.
    """

    total: Tensor
    active: Tensor


@dataclass
class AnswerStatistics:
    """Activation statistics of one layer, over the chosen or the rejected answers.

    Attributes:
        total: The activation, summed over answers, `(d_model,)` in float32.
        features: Statistics of each SAE that an adapter uses at the layer, by the SAE's content hash.
    """

    total: Tensor
    features: dict[str, FeatureStatistics]


@dataclass
class Contrast:
    """Statistics of chosen and rejected answers at each steered layer.

    Attributes:
        chosen: Statistics of the chosen answers, by layer index.
        rejected: Statistics of the rejected answers, by layer index.
        pairs: Number of pairs.
    """

    chosen: dict[int, AnswerStatistics]
    rejected: dict[int, AnswerStatistics]
    pairs: int


def measure_contrast(
    model: nn.Module,
    dataset: Iterable[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: str = "completion",
    batch_size: int = 8,
) -> Contrast:
    """Measures the activations of chosen and rejected answers, for `fit_caa` and `fit_sas`.

    A single pass without steering covers every layer that any adapter of the model steers. Each answer has the same
    weight, whatever its length.

    Args:
        model: A `PeftModel` with YaPO adapters; their layers and SAEs are measured.
        dataset: Preference pairs in TRL's format, conversational or plain, with a `prompt`.
        tokenizer: The model's tokenizer.
        tokens: Which tokens of an answer to read: "completion" averages over all of them; "last" reads the final one,
            such as the letter of a multiple-choice answer. Special tokens before the text are skipped, and so is
            everything from the first special token after it, such as the end of the turn.
        batch_size: Pairs per forward pass.

    Returns:
        Sums and counts, on the CPU.

    Raises:
        ConfigError: The model has no YaPO adapter, or an argument is invalid.
        DatasetError: The dataset is empty, or a pair has no answer or lacks a column.

    Source: arXiv 2312.06681 (CAA) and 2503.00177 (SAS), which read the token of the answer's letter.
    """
    choice(get_args(AnswerTokens), tokens=tokens)
    layers = steered_layers(model)
    if not layers or not isinstance(model, PeftModel):
        raise ConfigError(
            f"{type(model).__name__} has no YaPO adapter: attach those to fit with get_peft_model and add_adapter."
        )
    batches = pair_batches(dataset, tokenizer, batch_size)
    require_length(model.get_base_model(), longest(batches), "A pair")
    contrast, special = Contrast({}, {}, 0), special_tokens(tokenizer)
    device = device_of(model)
    with evaluating(model):
        for batch in tqdm(batches, desc="Reading answers", unit="batch"):
            weights = _token_weights(batch, special, tokens)
            inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
            outputs = unsteered_outputs(model, layers, inputs)
            for layer in layers:
                _add(contrast, layer, outputs[layer.index], weights)
            contrast.pairs += len(weights) // 2
    return contrast


def _token_weights(batch: dict[str, Tensor], special: Tensor, tokens: str) -> Tensor:
    """The weight of each token, `(2 * pairs, seq)`; an answer's weights sum to 1."""
    answer = batch["answer_mask"].bool()
    text = answer & ~torch.isin(batch["input_ids"], special)
    # Skips special tokens before the text; the first one after it ends the answer.
    ended = ((text.cumsum(dim=1) > 0) & ~text).cumsum(dim=1) > 0
    content = text & ~ended
    # An answer of special tokens alone is read as a whole.
    content = torch.where(content.any(dim=1, keepdim=True), content, answer)
    if tokens == "last":
        position = torch.arange(content.shape[1]).expand_as(content)
        last = position.masked_fill(~content, -1).max(dim=1, keepdim=True).values
        content = position == last
    return content / content.sum(dim=1, keepdim=True)


def _add(contrast: Contrast, layer: YaPOLayer, hidden: Tensor, weights: Tensor) -> None:
    """Adds a batch of answers to a layer's statistics."""
    weights = weights.to(hidden.device)
    row, position = weights.nonzero(as_tuple=True)
    read, weight = hidden[row, position], weights[row, position]
    saes = {sae.identity.content_hash: sae for sae in layer.yapo_sae.values() if sae is not None}
    means = torch.zeros(len(weights), hidden.shape[-1], device=hidden.device)
    means.index_add_(0, row, read.float() * weight[:, None])
    features = {key: _mean_features(read, row, weight, len(weights), sae) for key, sae in saes.items()}
    for kind, part in (
        (contrast.chosen, slice(None, len(weights) // 2)),
        (contrast.rejected, slice(len(weights) // 2, None)),
    ):
        found = kind.setdefault(layer.index, AnswerStatistics(torch.zeros(hidden.shape[-1]), {}))
        found.total += means[part].sum(dim=0).cpu()
        for key, values in features.items():
            size = values.shape[1]
            own = found.features.setdefault(key, FeatureStatistics(torch.zeros(size), torch.zeros(size)))
            own.total += values[part].sum(dim=0).cpu()
            own.active += (values[part] > 0).sum(dim=0).cpu()


def _mean_features(read: Tensor, row: Tensor, weight: Tensor, rows: int, sae: FrozenSAE) -> Tensor:
    """The weighted mean of each row's features over its tokens, `(rows, d_sae)`."""
    active = ActiveFeatures.of(read, sae.weights(read.device, read.dtype))
    means = torch.zeros(rows, sae.identity.d_sae, device=read.device)
    means.index_put_((row[active.token], active.feature), active.value * weight[active.token], accumulate=True)
    return means


def statistics_at(contrast: Contrast, layer: YaPOLayer) -> tuple[AnswerStatistics, AnswerStatistics]:
    """Returns the statistics of chosen and of rejected answers at a layer.

    Raises:
        ConfigError: The contrast does not cover the layer.
    """
    if layer.index not in contrast.chosen:
        raise ConfigError(
            f"The contrast covers layers {sorted(contrast.chosen)}, but the adapter steers layer {layer.index}: call "
            "measure_contrast again after adding the adapter."
        )
    return contrast.chosen[layer.index], contrast.rejected[layer.index]
