"""Finds the passages with the highest activations of features."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .._utils import at_least, evaluating, hash_model, replacing
from ..errors import ConfigError
from ..sae import FrozenSAE
from ..tuner.adapters import adapter_of, unsteered_outputs
from ..tuner.blocks import base_of, is_steering
from .checks import features_by_layer
from .texts import device_and_dtype, padded, require_texts, text_batches, tokenizer_of

_SAVED_EVERY = 50
# On SmolLM2, the norm of a text's first token is 140 times the median, and that of the second can be 10 to 20 times.
_SINK = 5


@dataclass(order=True)
class _Passage:
    """A passage around a feature's peak, ordered by the peak, and among equals the earlier text first."""

    peak: float
    minus_text: int
    position: int
    tokens: list[int]
    values: list[float]


def contexts(
    model: nn.Module,
    features: Sequence[int] | Mapping[int, Sequence[int]],
    texts: Iterable[Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    adapter_name: str | None = None,
    top: int = 5,
    window: int = 12,
    skip_sinks: bool = True,
    batch_size: int = 8,
    max_length: int = 512,
    resume: str | Path | None = None,
) -> pd.DataFrame:
    """Finds the passages with the highest activations of features, without steering.

    Texts are streamed; memory holds `top` passages per feature, at most one per text.

    Args:
        model: A `PeftModel` with a sparse YaPO adapter; left unchanged.
        features: Feature indices, if the adapter steers one layer; else a mapping from layer index to feature indices.
        texts: Any iterable, such as a streamed dataset, of texts, messages, or rows with a column `text`, `messages`,
            or `prompt` and `chosen`.
        tokenizer: The model's tokenizer; loaded by the model's name if None.
        adapter_name: The adapter whose SAEs to use; the active one if None.
        top: Number of passages per feature.
        window: Number of tokens to show before and after the peak.
        skip_sinks: Whether to skip attention sinks: the first token of each text, and tokens whose activations have
            more than five times the median norm of the text's other tokens. They do not depend on the text, and SAEs
            are not trained on them.
        batch_size: Texts per forward pass.
        max_length: Maximum number of tokens per text; longer texts are truncated.
        resume: A file to save progress to. An interrupted run resumes from it, given the same texts in the same order.

    Returns:
        A row per feature and passage, the highest peaks first: `layer`, `feature`, `rank`, `peak` (the activation),
        `text` (index of the text), `position` (of the peak, in tokens of the text), and `tokens` and `values`, the
        passage's tokens as texts and the activation at each, 0 at skipped tokens. A feature that is never active has no
        row.

    Raises:
        ConfigError: The adapter or a feature does not exist, an argument is invalid, or `resume` is a file of another
            search.
        DatasetError: A text is not a text, messages or a row.
    """
    name, _, all_layers = adapter_of(model, adapter_name)
    wanted = features_by_layer(features, all_layers, name)
    if not wanted:
        raise ConfigError(f"features={features!r}: must have at least one feature.")
    at_least(1, top=top)
    at_least(0, window=window)
    if resume is not None and Path(resume).is_dir():
        raise ConfigError(f"resume={str(resume)!r}: must be a file, but is a folder.")
    tokenizer = tokenizer_of(model, tokenizer)
    layers = [layer for layer in all_layers if layer.index in wanted]
    saes = {layer.index: cast(FrozenSAE, layer.yapo_sae[name]) for layer in layers}
    record = {
        "features": {str(layer): found for layer, found in wanted.items()},
        "saes": {str(layer): sae.identity.content_hash for layer, sae in saes.items()},
        "options": [top, window, skip_sinks, max_length],
        "model": hash_model(base_of(model), ignore=is_steering, sampled=True),
    }
    search = _Search(None if resume is None else Path(resume), record, wanted)
    device, dtype = device_and_dtype(model)
    with evaluating(model):
        parts = {
            index: sae.select(torch.tensor(wanted[index], device=device), device, dtype) for index, sae in saes.items()
        }
        require_texts(texts)
        batches = text_batches(search.remaining(texts), tokenizer, batch_size, max_length, model)
        for count, batch in enumerate(tqdm(batches, desc="Reading texts", unit="batch"), 1):
            if any(batch):
                outputs = unsteered_outputs(model, layers, padded(batch, tokenizer, device))
                for layer in layers:
                    h = outputs[layer.index]
                    values = parts[layer.index].encode(h)[0].float()
                    if skip_sinks:
                        values = values.masked_fill(_sinks(h, [len(tokens) for tokens in batch])[..., None], 0)
                    search.add(layer.index, batch, values, top, window)
            search.done += len(batch)
            if count % _SAVED_EVERY == 0:
                search.save()
    search.save()
    return search.table(tokenizer)


def _sinks(h: Tensor, lengths: list[int]) -> Tensor:
    """The mask of attention sinks, `(batch, seq)`, of texts with these lengths, by the norms of a layer's output."""
    norms = h.float().norm(dim=-1)
    others = [row[1:length] if length > 1 else row[:1] for row, length in zip(norms, lengths, strict=True)]
    medians = torch.stack([row.median() for row in others])
    sinks = norms > _SINK * medians[:, None]
    sinks[:, 0] = True
    return sinks


class _Search:
    """The best passages so far, and the number of texts read; resumes from a file if it exists.

    Raises:
        ConfigError: The file is of another search.
    """

    def __init__(self, file: Path | None, record: dict[str, Any], wanted: dict[int, list[int]]) -> None:
        self._file, self._record, self._wanted = file, record, wanted
        self.best: dict[tuple[int, int], list[_Passage]] = {
            (layer, feature): [] for layer, features in wanted.items() for feature in features
        }
        self.done = 0
        # The hash of all texts read so far; batches are complete when it is saved.
        self._read, self._expected = hashlib.sha256(), ""
        if file is None or not file.is_file():
            return
        try:
            content: Any = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            content = None
        if not isinstance(content, dict) or content.get("search") != record:
            raise ConfigError(f"resume={str(file)!r} is not a file of this search: pass another file.")
        self.done, self._expected = content["done"], content["texts"]
        for layer, feature, passages in content["best"]:
            self.best[layer, feature] = [_Passage(**passage) for passage in passages]

    def remaining(self, texts: Iterable[Any]) -> Iterator[Any]:
        """Yields the texts that were not read yet.

        Raises:
            ConfigError: The texts that were read are not those of the file.
        """
        left = iter(texts)
        for text in islice(left, self.done):
            self._read.update(repr(text).encode())
        if self.done and self._read.hexdigest() != self._expected:
            raise ConfigError(f"resume={str(self._file)!r} is of other texts: pass the same texts, or another file.")
        for text in left:
            self._read.update(repr(text).encode())
            yield text

    def add(self, layer: int, batch: list[list[int]], values: Tensor, top: int, window: int) -> None:
        """Adds the activations of a layer's features on a batch, `(batch, seq, n)`."""
        for row, tokens in enumerate(batch):
            if not tokens:
                continue
            own = values[row, : len(tokens)]
            peaks, at = own.max(dim=0)
            for column, (feature, peak) in enumerate(zip(self._wanted[layer], peaks.tolist(), strict=True)):
                best = self.best[layer, feature]
                if peak <= 0 or (len(best) == top and peak <= best[0].peak):
                    continue
                position = int(at[column])
                start, end = max(0, position - window), position + window + 1
                shown = own[start:end, column].tolist()
                passage = _Passage(peak, -(self.done + row), position, tokens[start:end], shown)
                (heapq.heappush if len(best) < top else heapq.heapreplace)(best, passage)

    def save(self) -> None:
        """Saves the progress to the file, if there is one."""
        if self._file is None:
            return
        best = [[*key, [asdict(passage) for passage in passages]] for key, passages in self.best.items()]
        content = {"search": self._record, "done": self.done, "texts": self._read.hexdigest(), "best": best}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self._file) as partial:
            partial.write_text(json.dumps(content), encoding="utf-8")

    def table(self, tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
        """Returns the passages as a table."""
        rows = [
            {
                "layer": layer,
                "feature": feature,
                "rank": rank,
                "peak": passage.peak,
                "text": -passage.minus_text,
                "position": passage.position,
                "tokens": [tokenizer.decode([token]) for token in passage.tokens],
                "values": passage.values,
            }
            for (layer, feature), passages in self.best.items()
            for rank, passage in enumerate(sorted(passages, reverse=True), 1)
        ]
        columns = ["layer", "feature", "rank", "peak", "text", "position", "tokens", "values"]
        return pd.DataFrame(rows, columns=columns)
