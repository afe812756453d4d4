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
from ..tuner.adapters import adapter_of
from ..tuner.layer import is_steering
from .checks import features_by_layer
from .texts import base_of, device_and_dtype, padded, require_texts, text_batches, tokenizer_of, unsteered_outputs

_SAVED_EVERY = 50
# On SmolLM2 the second token of a text can be 10 to 20 times as long as the median, and the first 140 times.
_SINK = 5


@dataclass(order=True)
class _Passage:
    """Where a feature is on: ordered by how far, and among equals the earlier text first."""

    peak: float
    minus_text: int
    at: int
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

    Texts are streamed: what is kept is `top` passages of each feature, one of a text at most. The model is not changed.

    Args:
        model: A `PeftModel` with a sparse YaPO adapter, whose SAEs are read.
        features: Feature indices, if the adapter steers one layer; else a mapping from layer index to feature indices.
        texts: Any iterable, such as a streamed dataset, of texts, messages, or rows with a column `text`, `messages`,
            or `prompt` and `chosen`.
        tokenizer: The model's; found by the model's name if None.
        adapter_name: The adapter; the active one if None.
        top: Passages of each feature.
        window: Tokens before and after the one where the feature is on the most.
        skip_sinks: Whether to leave out attention sinks: the first token of each text, and those whose activations are
            more than five times as long as the median of its other tokens. They say nothing of the text, and SAEs are
            not trained on them.
        batch_size: Texts per forward pass.
        max_length: Tokens of a text that are read.
        resume: A file that keeps what was found. A run that was stopped goes on there, with the same texts in the
            same order.

    Returns:
        A row per feature and passage, the strongest first: `layer`, `feature`, `rank`, `peak` (how far it is on),
        `text` (index of the text), `position` (of the peak, in tokens of the text), and `tokens` and `values`, the
        passage's tokens as texts and how far the feature is on at each, 0 at those left out. A feature that is never on
        has no row.

    Raises:
        ConfigError: There is no such adapter or feature, an argument has a value that cannot work, or `resume` is a
            file of another search.
        DatasetError: A text is not one.
    """
    name, _, all_layers = adapter_of(model, adapter_name)
    wanted = features_by_layer(features, all_layers, name)
    if not wanted:
        raise ConfigError("features= is empty: name one feature at least.")
    at_least(1, top=top)
    at_least(0, window=window)
    if resume is not None and Path(resume).is_dir():
        raise ConfigError(f"resume={str(resume)!r} is a folder: name a file.")
    tokenizer = tokenizer_of(model, tokenizer)
    layers = [layer for layer in all_layers if layer.index in wanted]
    saes = {layer.index: cast(FrozenSAE, layer.yapo_sae[name]) for layer in layers}
    record = {
        "features": {str(layer): found for layer, found in wanted.items()},
        "saes": {str(layer): sae.identity.content_hash for layer, sae in saes.items()},
        "options": [top, window, skip_sinks, max_length],
        "model": hash_model(base_of(model), ignore=is_steering, sampled=True),
    }
    search = _Search.resumed(None if resume is None else Path(resume), record, wanted)
    device, dtype = device_and_dtype(model)
    with evaluating(model):
        parts = {
            index: sae.select(torch.tensor(wanted[index], device=device), device, dtype) for index, sae in saes.items()
        }
        require_texts(texts)
        batches = text_batches(search.after_those_done(texts), tokenizer, batch_size, max_length, model)
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
    """Which tokens of texts of these lengths are attention sinks, `(batch, seq)`, by a layer's output."""
    norms = h.float().norm(dim=-1)
    others = [row[1:length] if length > 1 else row[:1] for row, length in zip(norms, lengths, strict=True)]
    usual = torch.stack([row.median() for row in others])
    sinks = norms > _SINK * usual[:, None]
    sinks[:, 0] = True
    return sinks


class _Search:
    """The best passages so far, and how many texts were read."""

    def __init__(self, file: Path | None, record: dict[str, Any], wanted: dict[int, list[int]]) -> None:
        self._file, self._record = file, record
        self.best: dict[tuple[int, int], list[_Passage]] = {
            (layer, feature): [] for layer, features in wanted.items() for feature in features
        }
        self._wanted = wanted
        # Of all texts that were read: whole batches, whenever it is asked for.
        self._read, self._expected = hashlib.sha256(), ""
        self.done = 0

    @classmethod
    def resumed(cls, file: Path | None, record: dict[str, Any], wanted: dict[int, list[int]]) -> _Search:
        """As a file has it, if there is one.

        Raises:
            ConfigError: It is of another search, or none.
        """
        search = cls(file, record, wanted)
        if file is None or not file.is_file():
            return search
        try:
            content: Any = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            content = None
        if not isinstance(content, dict) or content.get("search") != record:
            raise ConfigError(f"resume={str(file)!r} holds something else than this search: give another file.")
        search.done, search._expected = content["done"], content["texts"]
        for layer, feature, passages in content["best"]:
            search.best[layer, feature] = [_Passage(**passage) for passage in passages]
        return search

    def after_those_done(self, texts: Iterable[Any]) -> Iterator[Any]:
        """The texts that were not read yet.

        Raises:
            ConfigError: Those that were read are other ones than in the file.
        """
        left = iter(texts)
        for text in islice(left, self.done):
            self._read.update(repr(text).encode())
        if self.done and self._read.hexdigest() != self._expected:
            raise ConfigError(f"resume={str(self._file)!r} was made from other texts: give these, or another file.")
        for text in left:
            self._read.update(repr(text).encode())
            yield text

    def add(self, layer: int, batch: list[list[int]], values: Tensor, top: int, window: int) -> None:
        """Adds the activations of one layer's features, `(batch, seq, n)`."""
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
        """Writes what was found to the file, if there is one."""
        if self._file is None:
            return
        best = [[*key, [asdict(passage) for passage in passages]] for key, passages in self.best.items()]
        content = {"search": self._record, "done": self.done, "texts": self._read.hexdigest(), "best": best}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self._file) as partial:
            partial.write_text(json.dumps(content), encoding="utf-8")

    def table(self, tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
        """What was found."""
        rows = [
            {
                "layer": layer,
                "feature": feature,
                "rank": rank,
                "peak": passage.peak,
                "text": -passage.minus_text,
                "position": passage.at,
                "tokens": [tokenizer.decode([token]) for token in passage.tokens],
                "values": passage.values,
            }
            for (layer, feature), passages in self.best.items()
            for rank, passage in enumerate(sorted(passages, reverse=True), 1)
        ]
        columns = ["layer", "feature", "rank", "peak", "text", "position", "tokens", "values"]
        return pd.DataFrame(rows, columns=columns)
