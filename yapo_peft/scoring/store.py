"""Activations of training examples on disk, in safetensors files that are read in slices."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .._utils import hash_tensors, replacing
from ..errors import ActivationCacheError

# The columns that say in which store, and as which example of it, the activations of a row are.
COLUMNS = ("activations_store", "activations_row")
# Tokens per file: the most that an interrupted run has to compute again.
_TOKENS = 32_768
_OPEN_FILES = 64
_RECORD = "activations.json"
_HASH = "sha256"


@dataclass(frozen=True)
class CollateWithRows:
    """Wraps a collator: batches of cached examples keep the columns that locate their activations."""

    collate: Callable[..., dict[str, Tensor]]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Collates some examples of a dataset."""
        batch = self.collate(examples)
        for name in COLUMNS:
            if name in examples[0]:
                batch[name] = torch.tensor([example[name] for example in examples])
        return batch


@dataclass(frozen=True)
class Activations:
    """The stored activations of some tokens.

    Attributes:
        hidden: Output of the lowest steered layer, `(tokens, d_model)`.
        count: Number of active features of each token, `(tokens,)`.
        feature: Their indices, token after token, `(non-zeros,)`.
        value: Their activations, `(non-zeros,)`.
        reference: Log-probability of each answer token under the unsteered model, in nats; 0 in prompts.
    """

    hidden: Tensor
    count: Tensor
    feature: Tensor
    value: Tensor
    reference: Tensor

    def to(self, device: torch.device) -> Activations:
        """Moves the tensors to a device."""
        return Activations(*(tensor.to(device) for tensor in vars(self).values()))

    def split(self, sizes: list[int]) -> list[Activations]:
        """Splits into parts of the given numbers of tokens."""
        actives = [int(count.sum()) for count in self.count.split(sizes)]
        by_token = (tensor.split(sizes) for tensor in (self.hidden, self.count))
        by_feature = (tensor.split(actives) for tensor in (self.feature, self.value))
        columns = zip(*by_token, *by_feature, self.reference.split(sizes), strict=True)
        return [Activations(*column) for column in columns]

    @classmethod
    def join(cls, parts: list[Activations]) -> Activations:
        """Concatenates the tokens of several."""
        return cls(*(torch.cat(column) for column in zip(*(vars(part).values() for part in parts), strict=True)))


class ActivationStore:
    """The activations of a dataset's examples, in a folder of safetensors files.

    Files are written under a temporary name and then renamed, so that a file is always complete.

    Args:
        folder: The folder.
        sizes: Number of tokens of each example.
        record: What identifies the activations, saved with them.
    """

    def __init__(self, folder: Path, sizes: list[int], record: dict[str, Any]) -> None:
        self.folder = folder
        self._record = record
        self._parts: list[range] = []
        self._at: list[tuple[int, int, int]] = []
        first = at = 0
        for index, size in enumerate(sizes):
            self._at.append((len(self._parts), at, at + size))
            at += size
            if at >= _TOKENS or index == len(sizes) - 1:
                self._parts.append(range(first, index + 1))
                first, at = index + 1, 0
        self._open: OrderedDict[int, tuple[Any, Tensor]] = OrderedDict()
        self._sound: set[int] = set()

    @classmethod
    def with_any_sae(cls, place: Path, sizes: list[int], record: dict[str, Any]) -> ActivationStore | None:
        """Finds a complete store of the same activations, whatever its SAE, for adapters that need no features."""
        for file in sorted(place.glob(f"*/{_RECORD}")):
            try:
                there = json.loads(file.read_text())
            except (OSError, ValueError):
                continue
            is_same = isinstance(there, dict) and {**there, "sae": None} == {**record, "sae": None}
            # A folder that was renamed or copied does not count.
            store = cls(file.parent, sizes, there) if is_same and file.parent.name == fingerprint_of(there) else None
            if store is not None and not store.missing:
                return store
        return None

    @property
    def missing(self) -> list[range]:
        """The examples of the files that don't exist yet."""
        return [part for index, part in enumerate(self._parts) if not self._file(index).is_file()]

    def require_space(self, needed: float, name: str) -> str:
        """Creates the folder, and checks that its disk has room for the activations of a dataset.

        Returns:
            The size, for people to read.

        Raises:
            ActivationCacheError: The folder cannot be created, or the disk is too full.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ActivationCacheError(
                f"Activations cannot be kept in {str(self.folder)!r} ({error}): set another activation_cache_dir."
            ) from error
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise ActivationCacheError(
                f"Caching the activations of the {name} dataset needs about {_size(needed)}, and {str(self.folder)!r} "
                f"has {_size(free)} left: set another activation_cache_dir, activation_cache_dtype='bfloat16', or "
                "call yapo_peft.delete_activation_cache()."
            )
        return _size(needed)

    def write(self, examples: range, activations: Activations) -> None:
        """Writes the file of some examples, one of `missing`.

        Raises:
            ActivationCacheError: Writing failed.
        """
        tensors = {name: tensor.contiguous().cpu() for name, tensor in vars(activations).items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write_record()
            part = self._parts.index(examples)
            with replacing(self._file(part)) as partial:
                save_file(tensors, partial, metadata={_HASH: self._hash(part, tensors)})
        except (OSError, SafetensorError) as error:
            raise ActivationCacheError(
                f"Activations could not be written to {str(self.folder)!r} ({error}). Finished files are kept: make "
                "room, or set another activation_cache_dir, and start again."
            ) from error

    def read(self, examples: list[int]) -> Activations:
        """Reads the tokens of some examples, in order.

        Raises:
            ActivationCacheError: A file is missing, damaged, or belongs to other examples.
        """
        parts = []
        for example in examples:
            part, start, end = self._at[example]
            file, ends = self._opened(part)
            active = slice(int(ends[start - 1]) if start else 0, int(ends[end - 1]))
            tokens = slice(start, end)
            wanted = {"hidden": tokens, "count": tokens, "feature": active, "value": active, "reference": tokens}
            parts.append(Activations(**{name: file.get_slice(name)[where] for name, where in wanted.items()}))
        return Activations.join(parts)

    def _opened(self, part: int) -> tuple[Any, Tensor]:
        """An open file, and the cumulative number of non-zeros at each of its tokens."""
        if part not in self._open:
            name = self._file(part)
            try:
                file = safe_open(name, framework="pt")
                self._require_sound(part, file)
                ends = file.get_tensor("count").cumsum(0)
            except Exception as error:
                raise ActivationCacheError(
                    f"{str(name)!r} cannot be read ({error}). Delete it; it is computed again when training starts."
                ) from error
            self._open[part] = (file, ends)
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
        self._open.move_to_end(part)
        return self._open[part]

    def _require_sound(self, part: int, file: Any) -> None:
        """Checks a file's hash, once in a run because that reads all of it."""
        if part in self._sound:
            return
        tensors = {name: file.get_tensor(name) for name in Activations.__dataclass_fields__}
        if self._hash(part, tensors) != (file.metadata() or {}).get(_HASH):
            raise ValueError("its content, or its place, does not match its hash")
        tokens = max(end for index, _, end in self._at if index == part)
        if (found := len(file.get_tensor("count"))) != tokens:
            raise ValueError(f"it holds {found} tokens instead of {tokens}")
        self._sound.add(part)

    def _hash(self, part: int, tensors: dict[str, Tensor]) -> str:
        """The hash of a part's content and of where it belongs, so that no file stands in for another."""
        return hash_tensors(f"{fingerprint_of(self._record)}/{part}", sorted(tensors.items()))

    def _file(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.safetensors"

    def _write_record(self) -> None:
        file = self.folder / _RECORD
        if not file.is_file():
            with replacing(file) as partial:
                partial.write_text(json.dumps(self._record, indent=2))


def fingerprint_of(record: dict[str, Any]) -> str:
    """The name of the folder that holds the activations of a record."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:32]


def cache_folder(chosen: str | Path | None) -> Path:
    """The folder of cached activations: the given one, or one beside Hugging Face's other caches."""
    from huggingface_hub.constants import HF_HOME

    return Path(chosen or Path(HF_HOME) / "yapo_peft" / "activations").expanduser().resolve()


def delete_activation_cache(cache_dir: str | Path | None = None) -> int:
    """Deletes all cached activations.

    Args:
        cache_dir: The trainer's `activation_cache_dir`; None for the default folder.

    Returns:
        The number of bytes freed.
    """
    freed = 0
    for record in cache_folder(cache_dir).glob(f"*/{_RECORD}"):
        freed += sum(file.stat().st_size for file in record.parent.iterdir())
        shutil.rmtree(record.parent)
    return freed


def _size(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"
