"""A cache of everything below the output of the lowest steered layer, which training never changes."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from .._utils import evaluating, hash_model, remove_leftovers
from ..errors import ActivationCacheError, ConfigError, UnsupportedOperationError
from ..steering.learning import ActiveFeatures
from ..tuner import YaPOLayer
from ..tuner.adapters import one_sae
from ..tuner.blocks import is_steering
from ..tuner.layer import lowest_steered
from .checks import distance, require_constant, require_no_noise, same, why_not_shared
from .lm_head import AnswerHead
from .packing import PackedBatch, attention_cost, keep_rows, share_prompts, survey
from .scorer import CachedPairs
from .store import COLUMNS, Activations, ActivationStore, cache_folder, fingerprint_of
from .upper_half import UpperHalf

_FORMAT = 3


@dataclass(frozen=True)
class CacheOptions:
    """How activations are computed and kept.

    Attributes:
        folder: Where; None for a folder beside Hugging Face's caches.
        dtype: Name of the dtype on disk; None for that of the model's activations.
        batch_size: Pairs per forward pass.
        max_length: Tokens of a prompt with an answer at most, as in training; None for no limit.
        truncation_mode: As in training.
    """

    folder: str | None
    dtype: str | None
    batch_size: int
    max_length: int | None
    truncation_mode: str


@dataclass(frozen=True)
class _Cached:
    """A dataset's activations, their dtype within the model, and whether answers share their prompt in a row."""

    store: ActivationStore
    dtype: torch.dtype
    shared: bool


class ActivationCache:
    """Layer outputs, features and reference log-probabilities of datasets, computed once and kept on disk.

    Args:
        model: The model with its adapter.
        head: Its head.
        layers: Its steered layers, in order.
        accelerator: The run's.
        collate: The run's collator.
        training_mode: Makes the context of a forward pass in training mode without gradient checkpointing.
        options: How activations are computed and kept.

    Raises:
        UnsupportedOperationError: The lower layers don't compute the same in every step.
    """

    def __init__(
        self,
        model: nn.Module,
        head: AnswerHead,
        layers: list[YaPOLayer],
        accelerator: Accelerator,
        collate: Callable[..., Any],
        training_mode: Callable[[], AbstractContextManager[Any]],
        options: CacheOptions,
    ) -> None:
        assert isinstance(model, PeftModel)
        require_constant(model)
        self._model, self._head, self._accelerator, self._collate = model, head, accelerator, collate
        self._training_mode, self._options = training_mode, options
        self._base: Any = model.get_base_model()
        self._layers, self._layer = layers, cast(YaPOLayer, lowest_steered(layers))
        self._sae = one_sae(self._layer)
        self._upper = UpperHalf(self._base, self._layer.index)
        self._attention_cost = attention_cost(self._base, self._layer.block)
        self._model_hash = hash_model(self._base, ignore=is_steering)
        self._cached: dict[int, _Cached] = {}

    def add_all(self, train: Any, held_out: Any) -> tuple[Any, Any]:
        """As `add`, for a trainer's datasets; the evaluation dataset may be a dict of several, or None."""
        train = self.add(train, "train")
        if isinstance(held_out, dict):
            return train, {name: self.add(part, name) for name, part in held_out.items()}
        return train, None if held_out is None else self.add(held_out, "eval")

    def add(self, dataset: Any, name: str) -> Dataset:
        """Computes what is not on disk yet, and returns the dataset with `COLUMNS`.

        Args:
            dataset: A dataset that TRL has tokenized.
            name: Its name in messages.

        Raises:
            ActivationCacheError: There is not enough disk space, or the activations on disk don't fit the model.
            UnsupportedOperationError: The dataset is a stream, prompts would be truncated, or the model's lower layers
                cannot be skipped.
        """
        if not isinstance(dataset, Dataset):
            raise UnsupportedOperationError(
                f"cache_activations=True needs datasets of known length, and the {name} dataset is a "
                f"{type(dataset).__name__}: load it without streaming, or train without the cache."
            )
        dataset = dataset.remove_columns([column for column in COLUMNS if column in dataset.column_names])
        lengths, data_hash = survey(dataset, self._options.max_length, self._options.truncation_mode, name)
        sizes = lengths.sum(dim=1).tolist()
        spans = lengths[:, 0] + lengths[:, 1:].max(dim=1).values
        longest = spans.argsort(descending=True)[:2].tolist()
        sample = self._batch([dataset[index] for index in longest])
        plain = keep_rows(sample)
        with self._unsteered():
            found: list[Tensor] = []
            with self._upper.observed(found):
                expected = self._score(plain)
            require_no_noise(self._model, self._score, plain, expected, self._training_mode())
            is_exact = self._is_exact(torch.float32)
            why_not = why_not_shared(self._base, self._score, sample, expected, int(spans.max()), is_exact)
            active = self._encode(found[0]).token.numel() / found[0].shape[:2].numel()
        dtype = getattr(torch, self._options.dtype or str(found[0].dtype).removeprefix("torch."))
        record = {
            "format": _FORMAT,
            "model": self._model_hash,
            "layer": self._layer.index,
            "sae": None if self._sae is None else self._sae.identity.content_hash,
            "data": data_hash,
            "attention": self._base.config._attn_implementation,
            "precision": f"{found[0].dtype}, {self._accelerator.mixed_precision}, stored as {dtype}",
        }
        place = cache_folder(self._options.folder)
        store = None if self._sae is not None else ActivationStore.with_any_sae(place, sizes, record)
        store = store or ActivationStore(place / fingerprint_of(record), sizes, record)
        cached = _Cached(store, found[0].dtype, why_not is None)
        width = found[0].shape[-1] * dtype.itemsize + active * (4 + dtype.itemsize) + 8
        self._announce(store, name, sizes, width, why_not)
        self._fill(cached, dataset, sizes, dtype, name)
        # From the folder's name, so that rows of another trainer's datasets are not taken for these.
        number = int(store.folder.name[:8], 16)
        self._cached[number] = cached
        with self._unsteered():
            again = self._pairs(cached, self._model, sample, longest)(fused_lm_head=True)
        hidden, stored = found[0].flatten(0, 1)[plain.place], store.read(longest).hidden.to(found[0])
        apart = float(((hidden - stored).norm(dim=-1) / hidden.norm(dim=-1)).max())
        is_exact = self._is_exact(dtype)
        if not same(again.log_probs, expected, is_exact) or apart > (1e-3 if is_exact else 5e-2):
            raise ActivationCacheError(
                f"The activations in {str(store.folder)!r} are not this model's: they differ by {apart:.2g} of their "
                f"norm, and the log-probabilities computed from them by {distance(again.log_probs, expected):.2g} nats "
                f"per token. Delete that folder. If this happens again, a layer of {type(self._base).__name__} depends "
                "on more than the output of the one below: train without cache_activations."
            )
        for column, values in zip(COLUMNS, ([number] * len(dataset), list(range(len(dataset)))), strict=True):
            dataset = cast(Dataset, dataset.add_column(column, values))  # pyright: ignore
        return dataset

    def pairs(
        self, model: Callable[..., Any], inputs: dict[str, Tensor], directions: Tensor | None = None
    ) -> CachedPairs | None:
        """Returns a scorer for a collated batch; None if the batch is not of one dataset that was added.

        Args:
            model: The model as it is called in training.
            inputs: The batch, with `COLUMNS` if it is cached.
            directions: The direction that each pair is steered in, `(pairs,)`; None if it is the same for all.

        Raises:
            ConfigError: Another adapter was made active than the one whose layer and SAE are cached.
        """
        numbers, rows = (inputs[name].tolist() if name in inputs else [] for name in COLUMNS)
        cached = self._cached.get(numbers[0]) if len(set(numbers)) == 1 else None
        if cached is None:
            return None
        lowest = cast(YaPOLayer, lowest_steered(self._layers))
        if lowest is not self._layer or one_sae(lowest) is not self._sae:
            raise ConfigError(
                f"Activations are cached for the adapter that was active when the trainer was created, on layer "
                f"{self._layer.index}; {lowest.active_adapters} now steer layer {lowest.index}. Create a new trainer."
            )
        return self._pairs(cached, model, inputs, rows, directions)

    def _pairs(
        self,
        cached: _Cached,
        model: Callable[..., Any],
        inputs: dict[str, Tensor],
        rows: list[int],
        directions: Tensor | None = None,
    ) -> CachedPairs:
        stored = cached.store.read(rows).to(inputs["input_ids"].device)
        batch = self._pack(inputs, cached.shared, directions)
        hidden = stored.hidden.to(cached.dtype)[batch.flat]
        unsteered = torch.zeros(batch.scored.shape, device=hidden.device)
        unsteered = unsteered.masked_scatter(batch.scored, stored.reference[batch.target_flat])
        features = self._features(stored, hidden, batch)
        return CachedPairs(model, self._head, self._upper, self._layer.call, batch, hidden, features, unsteered)

    def _features(self, stored: Activations, hidden: Tensor, batch: PackedBatch) -> ActiveFeatures:
        """The stored features of a packed batch's tokens; none if the adapter is dense."""
        if self._sae is None:
            return ActiveFeatures.none(hidden.device)
        token = torch.arange(len(stored.count), device=hidden.device).repeat_interleave(stored.count.long())
        scale = self._sae.normalize(hidden.flatten(0, 1))[1]
        features = ActiveFeatures(token, stored.feature.long(), stored.value.float(), scale)
        return features.at(batch.flat.masked_fill(~batch.real, -1).flatten(), len(stored.count))

    def _fill(self, cached: _Cached, dataset: Dataset, sizes: list[int], dtype: torch.dtype, name: str) -> None:
        """Computes the missing files, split among the processes."""
        if self._accelerator.is_main_process:
            remove_leftovers(cached.store.folder)
        missing = cached.store.missing[self._accelerator.process_index :: self._accelerator.num_processes]
        self._accelerator.wait_for_everyone()
        quiet = bool(os.environ.get("TQDM_DISABLE")) or not self._accelerator.is_main_process
        total = sum(map(len, missing))
        with tqdm(total=total, desc=f"Caching activations of the {name} dataset", disable=quiet or not total) as bar:
            for part in missing:
                by_length = sorted(part, key=sizes.__getitem__)
                done: dict[int, Activations] = {}
                for start in range(0, len(part), self._options.batch_size):
                    examples = by_length[start : start + self._options.batch_size]
                    computed = self._compute([dataset[index] for index in examples], cached.shared, dtype)
                    done.update(zip(examples, computed.split([sizes[index] for index in examples]), strict=True))
                    bar.update(len(examples))
                cached.store.write(part, Activations.join([done[index] for index in part]))
        self._accelerator.wait_for_everyone()
        if cached.store.missing:
            raise ActivationCacheError(
                f"{str(cached.store.folder)!r} lacks files that other processes wrote: all processes must see the same "
                "folder. Set activation_cache_dir to one on a shared disk."
            )

    def _compute(self, examples: list[dict[str, Any]], shared: bool, dtype: torch.dtype) -> Activations:
        batch = self._pack(self._batch(examples), shared)
        found: list[Tensor] = []
        with self._unsteered(), self._upper.observed(found):
            log_probs = self._score(batch)
            hidden = found[0].flatten(0, 1)[batch.place]
            features = self._encode(hidden[None])
        reference = torch.zeros(len(hidden), device=hidden.device)
        reference[batch.target_flat] = log_probs[batch.scored].float()
        count = features.token.bincount(minlength=len(hidden)).int()
        return Activations(hidden.to(dtype), count, features.feature.int(), features.value.to(dtype), reference)

    def _announce(self, store: ActivationStore, name: str, sizes: list[int], width: float, why_not: str | None) -> None:
        """Prints what will be computed; raises before the work if the disk has no room for it."""
        missing = sum(sizes[index] for part in store.missing for index in part)
        if missing:
            needed = store.require_space(missing * width, name)
            self._accelerator.print(f"Caching the activations of {missing} tokens: about {needed} in {store.folder}.")
        how = "each prompt once for both answers" if why_not is None else f"rows as they are: {why_not}"
        self._accelerator.print(
            f"The {len(sizes)} pairs of the {name} dataset run only through the layers above layer "
            f"{self._layer.index}, on cached activations; {how}."
        )

    def _batch(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        device = self._accelerator.device
        return {name: value.to(device) for name, value in self._collate(examples).items()}

    def _pack(self, inputs: dict[str, Tensor], shared: bool, directions: Tensor | None = None) -> PackedBatch:
        return share_prompts(inputs, self._attention_cost, directions) if shared else keep_rows(inputs)

    def _score(self, batch: PackedBatch) -> Tensor:
        return self._head.packed(self._model, batch).log_probs

    def _encode(self, hidden: Tensor) -> ActiveFeatures:
        if self._sae is None:
            return ActiveFeatures.none(hidden.device)
        return ActiveFeatures.of(hidden, self._sae.weights(hidden.device, hidden.dtype))

    def _is_exact(self, stored: torch.dtype) -> bool:
        """Whether nothing is rounded to 16 bits."""
        return min(stored.itemsize, self._base.dtype.itemsize) >= 4 and self._accelerator.mixed_precision == "no"

    @contextmanager
    def _unsteered(self) -> Generator[None]:
        with evaluating(self._model), torch.no_grad(), self._model.disable_adapter(), self._accelerator.autocast():
            yield
