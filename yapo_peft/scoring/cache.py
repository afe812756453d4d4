"""Training on the upper half of the model: what lies below the lowest steered block's output is computed once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from .._utils import evaluating, hash_model
from ..errors import ActivationCacheError, ConfigError, UnsupportedOperationError
from ..steering.learning import ActiveFeatures
from ..trainer.config import YaPOTrainingConfig
from ..tuner import YaPOLayer
from ..tuner.layer import is_steering, lowest_steered
from .agreement import distance, same, why_not_shared
from .cacheable import one_sae, require_constant, require_no_noise
from .fingerprint import survey
from .packing import PackedBatch, attention_cost, keep_rows, share_prompts
from .scorer import CachedPairs, score_packed
from .store import Activations, ActivationStore, cache_folder, fingerprint_of
from .upper_half import UpperHalf

# The column that says which stored example a row of a dataset is.
COLUMN = "activations_row"
_ROW_BITS = 31
_FORMAT = 2


@dataclass(frozen=True)
class CollateWithRows:
    """As another collator; a batch of cached examples says which ones they are."""

    collate: Callable[..., dict[str, Tensor]]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Collates some examples of a dataset."""
        batch = self.collate(examples)
        if COLUMN in examples[0]:
            batch[COLUMN] = torch.tensor([example[COLUMN] for example in examples])
        return batch


@dataclass(frozen=True)
class _Cached:
    """A dataset's activations, their dtype within the model, and whether answers share their prompt in a row."""

    store: ActivationStore
    dtype: torch.dtype
    shared: bool


class ActivationCache:
    """Block outputs, features and reference log-probabilities of datasets, computed once and kept on disk.

    Args:
        model: The model with its adapter.
        layers: Its steered layers, from the bottom up.
        args: The training config.
        accelerator: The run's.
        collate: TRL's collator.

    Raises:
        UnsupportedOperationError: What the lower blocks put out is not the same in every step.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[YaPOLayer],
        args: YaPOTrainingConfig,
        accelerator: Accelerator,
        collate: Callable[..., Any],
    ) -> None:
        assert isinstance(model, PeftModel)
        require_constant(model)
        self._model, self._args, self._accelerator, self._collate = model, args, accelerator, collate
        self._base: Any = model.get_base_model()
        self._layers, self._layer = layers, cast(YaPOLayer, lowest_steered(layers))
        self._sae = one_sae(self._layer)
        self._upper = UpperHalf(self._base, self._layer.index)
        self._attention_cost = attention_cost(self._base, self._layer.block)
        self._model_hash = hash_model(self._base, ignore=is_steering)
        self._cached: dict[int, _Cached] = {}

    def add_all(self, train: Any, held_out: Any) -> tuple[Any, Any]:
        """As `add`, for a trainer's datasets; the one to evaluate on may be a dict of them, or None."""
        train = self.add(train, "train")
        if isinstance(held_out, dict):
            return train, {name: self.add(part, name) for name, part in held_out.items()}
        return train, None if held_out is None else self.add(held_out, "eval")

    def add(self, dataset: Any, name: str) -> Dataset:
        """Computes what is not on disk yet, and returns the dataset with a column that points there.

        Args:
            dataset: A dataset that TRL has tokenised.
            name: What to call it in messages.

        Raises:
            ActivationCacheError: There is not enough disk space, or what is there does not fit the model.
            UnsupportedOperationError: The dataset is a stream, truncation parts prompts, or the model's blocks cannot
                be skipped.
        """
        if not isinstance(dataset, Dataset):
            raise UnsupportedOperationError(
                f"cache_activations=True needs datasets of known length, and the {name} dataset is a "
                f"{type(dataset).__name__}: load it without streaming, or train without the cache."
            )
        dataset = dataset.remove_columns([COLUMN] if COLUMN in dataset.column_names else [])
        lengths, data_hash = survey(dataset, self._args, name)
        sizes = lengths.sum(dim=1).tolist()
        spans = lengths[:, 0] + lengths[:, 1:].max(dim=1).values
        longest = spans.argsort(descending=True)[:2].tolist()
        sample = self._batch([dataset[index] for index in longest])
        plain = keep_rows(sample)
        with self._unsteered():
            found: list[Tensor] = []
            with self._upper.observed(found):
                expected = self._score(plain)
            require_no_noise(self._model, self._base, plain, expected, self._args.gradient_checkpointing_kwargs)
            is_exact = self._is_exact(torch.float32)
            why_not = why_not_shared(self._base, self._score, sample, expected, int(spans.max()), is_exact)
            active = self._encode(found[0]).token.numel() / found[0].shape[:2].numel()
        dtype = getattr(torch, self._args.activation_cache_dtype or str(found[0].dtype).removeprefix("torch."))
        record = {
            "format": _FORMAT,
            "model": self._model_hash,
            "layer": self._layer.index,
            "sae": None if self._sae is None else self._sae.identity.content_hash,
            "data": data_hash,
            "attention": self._base.config._attn_implementation,
            "precision": f"{found[0].dtype}, {self._accelerator.mixed_precision}, stored as {dtype}",
        }
        place = cache_folder(self._args.activation_cache_dir)
        store = None if self._sae is not None else ActivationStore.with_any_sae(place, sizes, record)
        store = store or ActivationStore(place / fingerprint_of(record), sizes, record)
        folder = store.folder
        cached = _Cached(store, found[0].dtype, why_not is None)
        width = found[0].shape[-1] * dtype.itemsize + active * (4 + dtype.itemsize) + 8
        self._announce(cached.store, name, sizes, width, why_not)
        self._fill(cached, dataset, sizes, dtype, name)
        # Rows carry the number of their store: those of another trainer's datasets are not taken for these.
        number = int(folder.name[:8], 16)
        self._cached[number] = cached
        rows = torch.arange(len(dataset)) + (number << _ROW_BITS)
        with self._unsteered():
            again = cast(CachedPairs, self.pairs(self._model, sample, rows[longest]))(fused_lm_head=True)
            hidden, stored = found[0].flatten(0, 1)[plain.place], cached.store.read(longest).hidden.to(found[0])
        apart = float(((hidden - stored).norm(dim=-1) / hidden.norm(dim=-1)).max())
        is_exact = self._is_exact(dtype)
        if not same(again.log_probs, expected, is_exact) or apart > (1e-3 if is_exact else 5e-2):
            raise ActivationCacheError(
                f"The activations in {str(folder)!r} are not the model's: they are {apart:.2g} of their norm apart, "
                f"and the log-probabilities that follow {distance(again.log_probs, expected):.2g} nats per token. "
                f"Delete that folder. If this happens again, a block of {type(self._base).__name__} depends on more "
                "than the output of the one below: train without cache_activations."
            )
        return dataset.add_column(COLUMN, rows.tolist())  # pyright: ignore

    def pairs(
        self, model: Callable[..., Any], inputs: dict[str, Tensor], rows: Tensor, directions: Tensor | None = None
    ) -> CachedPairs | None:
        """A collated batch, ready to be scored by the upper half; None if it is not of one dataset that was added.

        Args:
            model: The model as it is called in training.
            inputs: The batch.
            rows: Which rows of the datasets it holds, `(pairs,)`.
            directions: In which direction each pair is steered, `(pairs,)`, or None if all are steered alike.

        Raises:
            ConfigError: Another adapter was made active than the one whose layer and SAE are cached.
        """
        numbers = {row >> _ROW_BITS for row in rows.tolist()}
        cached = self._cached.get(min(numbers)) if len(numbers) == 1 else None
        if cached is None:
            return None
        lowest = cast(YaPOLayer, lowest_steered(self._layers))
        if lowest is not self._layer or one_sae(lowest) is not self._sae:
            raise ConfigError(
                f"Activations are cached for the adapter that was active when the trainer was made, on layer "
                f"{self._layer.index}; {lowest.active_adapters} now steer layer {lowest.index}. Make a new trainer."
            )
        examples = [row & ((1 << _ROW_BITS) - 1) for row in rows.tolist()]
        stored = cached.store.read(examples).to(inputs["input_ids"].device)
        batch = self._pack(inputs, cached.shared, directions)
        hidden = stored.hidden.to(cached.dtype)[batch.flat]
        features = self._features(stored, hidden, batch)
        unsteered = torch.zeros(batch.scored.shape, device=hidden.device)
        unsteered = unsteered.masked_scatter(batch.scored, stored.reference[batch.target_flat])
        return CachedPairs(model, self._upper, self._layer.call, batch, hidden, features, unsteered)

    def _features(self, stored: Activations, hidden: Tensor, batch: PackedBatch) -> ActiveFeatures:
        """The stored features of a packed batch's tokens; none if nothing reads them."""
        if self._sae is None:
            return ActiveFeatures.none(hidden.device)
        token = torch.arange(len(stored.count), device=hidden.device).repeat_interleave(stored.count.long())
        scale = self._sae.normalize(hidden.flatten(0, 1))[1]
        features = ActiveFeatures(token, stored.feature.long(), stored.value.float(), scale)
        return features.at(batch.flat.masked_fill(~batch.real, -1).flatten(), len(stored.count))

    def _fill(self, cached: _Cached, dataset: Dataset, sizes: list[int], dtype: torch.dtype, name: str) -> None:
        """Computes the missing files, each by one process."""
        if self._accelerator.is_main_process:
            cached.store.remove_leftovers()
        rank, processes = self._accelerator.process_index, self._accelerator.num_processes
        missing = cached.store.missing[rank::processes]
        self._accelerator.wait_for_everyone()
        quiet = bool(os.environ.get("TQDM_DISABLE")) or not self._accelerator.is_main_process
        total = sum(map(len, missing))
        with tqdm(total=total, desc=f"Caching activations of the {name} dataset", disable=quiet or not total) as bar:
            for part in missing:
                by_length = sorted(part, key=sizes.__getitem__)
                size = self._args.precompute_ref_batch_size or self._args.per_device_train_batch_size
                done: dict[int, Activations] = {}
                for start in range(0, len(part), size):
                    examples = by_length[start : start + size]
                    computed = self._compute([dataset[index] for index in examples], cached.shared, dtype)
                    done.update(zip(examples, computed.split([sizes[index] for index in examples]), strict=True))
                    bar.update(len(examples))
                cached.store.write(part, Activations.join([done[index] for index in part]))
        self._accelerator.wait_for_everyone()
        if cached.store.missing:
            raise ActivationCacheError(
                f"{str(cached.store.folder)!r} lacks files that other processes wrote: all processes must see the same "
                "folder. Give one on a shared disk as activation_cache_dir."
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

    def _announce(
        self, store: ActivationStore, name: str, sizes: list[int], width: float, why_not_shared: str | None
    ) -> None:
        """Says what will be done; raises before the work if there is no room for it."""
        say = self._accelerator.print
        missing = sum(sizes[index] for part in store.missing for index in part)
        needed, place = missing * width, store.folder
        if missing:
            try:
                place.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ActivationCacheError(
                    f"Activations cannot be kept in {str(place)!r} ({error}): give another activation_cache_dir."
                ) from error
            free = shutil.disk_usage(place).free
            if needed > free:
                raise ActivationCacheError(
                    f"Caching the activations of the {name} dataset needs about {_size(needed)}, and {str(place)!r} "
                    f"has {_size(free)} left: give another activation_cache_dir, activation_cache_dtype='bfloat16', or "
                    "call yapo_peft.delete_activation_cache()."
                )
            say(f"Caching the activations of {missing} tokens: about {_size(needed)} in {store.folder}.")
        how = "each prompt once for both answers" if why_not_shared is None else f"rows as they are: {why_not_shared}"
        say(
            f"The {len(sizes)} pairs of the {name} dataset run through the blocks above block {self._layer.index} "
            f"alone, on cached activations; {how}."
        )

    def _batch(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        device = self._accelerator.device
        return {name: value.to(device) for name, value in self._collate(examples).items()}

    def _pack(self, inputs: dict[str, Tensor], shared: bool, directions: Tensor | None = None) -> PackedBatch:
        return share_prompts(inputs, self._attention_cost, directions) if shared else keep_rows(inputs)

    def _score(self, batch: PackedBatch) -> Tensor:
        return score_packed(self._base, self._model, batch).log_probs

    def _encode(self, hidden: Tensor) -> ActiveFeatures:
        if self._sae is None:
            return ActiveFeatures.none(hidden.device)
        return ActiveFeatures.of(hidden, self._sae.weights(hidden.device, hidden.dtype))

    def _is_exact(self, stored: torch.dtype) -> bool:
        """Whether nothing is rounded to 16 bits."""
        return min(stored.itemsize, self._base.dtype.itemsize) >= 4 and self._accelerator.mixed_precision == "no"

    @contextmanager
    def _unsteered(self) -> Generator[None]:
        with (
            evaluating(self._model),
            torch.no_grad(),
            self._model.disable_adapter(),
            self._accelerator.autocast(),
        ):
            yield


def _size(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"
