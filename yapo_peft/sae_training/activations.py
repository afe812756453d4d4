"""The activations of a model's layers: computed from text when they are needed, or stored."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .._utils import device_of, evaluating, hash_tensors, mixed_seed, replacing
from ..errors import DatasetError
from ..interpret.texts import padded
from ..scoring.pairs import special_tokens
from ..tuner.hooks import run_up_to
from .config import SAETrainingConfig
from .rows import by_length, usable

# Tokens with more than ten times the median norm are attention sinks.
_OUTLIER = 10
# Tokens that norms and means are estimated from, before training.
_SAMPLE, _KEPT = 1 << 16, 1 << 11


@dataclass
class LayerStatistics:
    """What is estimated of a layer's output before training.

    Attributes:
        limit: Norm from which a token is an attention sink, and is left out.
        scale: Factor that gives the others a mean norm of `sqrt(d_model)`.
        mean: Their mean, `(d_model,)`.
        sample: Some of them, `(tokens, d_model)`.
    """

    limit: float
    scale: float
    mean: Tensor
    sample: Tensor


class Activations:
    """The outputs of some layers of a model at the tokens of some sequences.

    Attributes:
        blocks: The layers, by their indices.
        rows: The sequences, `(seq,)` each.
        special: Tokens that are left out, `(n,)`.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: dict[int, nn.Module],
        rows: list[Tensor],
        tokenizer: PreTrainedTokenizerBase,
        config: SAETrainingConfig,
    ) -> None:
        self.blocks, self.rows, self.special = blocks, rows, special_tokens(tokenizer).int()
        self._model, self._tokenizer, self._config = model, tokenizer, config
        self._usable = [usable(row, self.special) for row in rows]
        self._starts = [0, *accumulate(map(len, rows))]
        self._stored: dict[int, Tensor] = {}

    def batches(
        self, indices: Iterable[int], most: int | None = None
    ) -> Iterator[tuple[list[int], dict[str, Tensor], Tensor]]:
        """Yields the indices of a batch of sequences, what to call the model with, and which tokens count.

        Tensors are `(batch, seq)`, on the model's device. Batches have at most `most` sequences.
        """
        device, size = device_of(self._model), self._config.forward_batch_size
        for batch in by_length(self.rows, indices, size if most is None else min(size, most)):
            counts = pad_sequence([self._usable[index] for index in batch], batch_first=True)
            inputs = padded([self.rows[index].tolist() for index in batch], self._tokenizer, device)
            yield batch, inputs, counts.to(device)

    @torch.no_grad()
    def _computed(self, indices: Iterable[int]) -> Iterator[tuple[list[int], dict[int, Tensor]]]:
        """Runs the model on sequences. Yields the indices of a batch, and the outputs at their tokens, in that order.

        Outputs are `(tokens, d_model)` by layer, on the model's device.
        """
        device = device_of(self._model)
        with evaluating(self._model), torch.autocast(device.type, torch.bfloat16, enabled=self._config.bf16):
            for batch, inputs, _ in self.batches(indices):
                outputs = run_up_to(self._model, self.blocks, inputs)
                mask = inputs["attention_mask"].bool()
                found = {layer: output[mask.to(output.device)] for layer, output in outputs.items()}
                yield batch, {layer: h.bfloat16() for layer, h in found.items()} if self._config.bf16 else found

    def of(self, indices: list[int], limits: dict[int, float] | None) -> dict[int, Tensor]:
        """The outputs at the tokens of sequences that count, `(tokens, d_model)` by layer, aligned between layers.

        Args:
            indices: The sequences.
            limits: Norms from which a token is left out; None for no such limit.
        """
        parts: dict[int, list[Tensor]] = {layer: [] for layer in self.blocks}
        for batch, outputs in self._read(indices):
            counts = torch.cat([self._usable[index] for index in batch]).to(next(iter(outputs.values())).device)
            for layer, limit in (limits or {}).items():
                counts &= (outputs[layer].float().norm(dim=1) < limit).to(counts.device)
            for layer, output in outputs.items():
                parts[layer].append(output[counts.to(output.device)])
        return {layer: torch.cat(found) for layer, found in parts.items()}

    def sample(self, tokens: int) -> list[int]:
        """Sequences of about so many tokens, at equal distances, because their order may be that of several sources."""
        return list(range(0, len(self.rows), max(1, round(self._starts[-1] / tokens))))

    def _read(self, indices: list[int]) -> Iterator[tuple[list[int], dict[int, Tensor]]]:
        if not self._stored:
            yield from self._computed(indices)
            return
        for (index,) in by_length(self.rows, indices, 1):
            place = slice(self._starts[index], self._starts[index + 1])
            yield [index], {layer: stored[place] for layer, stored in self._stored.items()}

    def store(self, folder: Path, name: str) -> None:
        """Computes all outputs once, and reads them from files from then on.

        Args:
            folder: Where the files are, or go to.
            name: What tells the model's outputs from those of others.
        """
        head = json.dumps([name, self._starts, self._config.bf16])
        key = hash_tensors(head, [("rows", torch.cat(self.rows))])[:16]
        paths = {layer: folder / f"{key}-layer-{layer}.bin" for layer in self.blocks}
        _, example = next(self._computed([0]))
        shapes = {layer: (output.dtype, self._starts[-1], output.shape[1]) for layer, output in example.items()}
        if not all(path.is_file() for path in paths.values()):
            folder.mkdir(parents=True, exist_ok=True)
            with ExitStack() as stack:
                partial = {layer: stack.enter_context(replacing(path)) for layer, path in paths.items()}
                self._write({layer: _mapped(path, True, *shapes[layer]) for layer, path in partial.items()})
        self._stored = {layer: _mapped(path, False, *shapes[layer]) for layer, path in paths.items()}

    def _write(self, files: dict[int, Tensor]) -> None:
        with tqdm(total=self._starts[-1], desc="Storing activations", unit="token", unit_scale=True) as progress:
            for batch, outputs in self._computed(range(len(self.rows))):
                places = torch.cat([torch.arange(*self._starts[index : index + 2]) for index in batch])
                for layer, output in outputs.items():
                    files[layer][places] = output.cpu()
                progress.update(len(places))

    def statistics(self) -> dict[int, LayerStatistics]:
        """Estimates norms and means on sequences at equal distances.

        Raises:
            DatasetError: They have no tokens that count.
        """
        outputs = self.of(self.sample(_SAMPLE), None)
        found: dict[int, LayerStatistics] = {}
        for layer, output in outputs.items():
            if not len(output):
                raise DatasetError("The text has only special tokens, and first ones of a text: pass longer texts.")
            norms = output.float().norm(dim=1)
            limit = _OUTLIER * float(norms.median())
            kept = output[norms < limit].float()
            found[layer] = LayerStatistics(
                limit,
                scale=float(kept.shape[1] ** 0.5 / kept.norm(dim=1).mean()),
                mean=kept.mean(0).cpu(),
                sample=kept[:: max(1, len(kept) // _KEPT)][:_KEPT].cpu(),
            )
        return found


def _mapped(path: Path, create: bool, dtype: torch.dtype, tokens: int, width: int) -> Tensor:
    """A file of activations, `(tokens, width)`, mapped into memory."""
    return torch.from_file(str(path), shared=create, size=tokens * width, dtype=dtype).view(tokens, width)


class ActivationStream:
    """An endless stream of shuffled batches of activations, which can continue where it was.

    The sequences are shuffled in each pass over the text. The activations of as many of them as the buffer holds are
    shuffled together; what is left of a buffer, less than a batch, is dropped.
    """

    def __init__(self, activations: Activations, limits: dict[int, float], config: SAETrainingConfig) -> None:
        self._activations, self._limits, self._config = activations, limits, config
        self._epoch, self._part, self._place = 0, 0, 0

    def __iter__(self) -> Iterator[dict[int, Tensor]]:
        """Yields the outputs at `batch_size` tokens, `(batch_size, d_model)` in float32, by layer."""
        size = self._config.batch_size
        while True:
            parts, is_empty = self._parts(), (self._part, self._place) == (0, 0)
            while self._part < len(parts):
                outputs = self._activations.of(parts[self._part], self._limits)
                tokens = len(next(iter(outputs.values())))
                seed = mixed_seed(self._config.seed, self._epoch, self._part)
                order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
                while self._place + size <= tokens:
                    chosen = order[self._place : self._place + size]
                    self._place, is_empty = self._place + size, False
                    yield {layer: output[chosen.to(output.device)].float() for layer, output in outputs.items()}
                self._part, self._place = self._part + 1, 0
            if is_empty:
                raise DatasetError(f"The text has fewer tokens than batch_size={size}: pass more text.")
            self._epoch, self._part = self._epoch + 1, 0

    def _parts(self) -> list[list[int]]:
        """The sequences of this pass over the text, in parts of as many tokens as the buffer holds."""
        rows = self._activations.rows
        generator = torch.Generator().manual_seed(mixed_seed(self._config.seed, self._epoch))
        parts, tokens = list[list[int]]([[]]), 0
        for index in torch.randperm(len(rows), generator=generator).tolist():
            if tokens >= self._config.buffer:
                parts.append([])
                tokens = 0
            parts[-1].append(index)
            tokens += len(rows[index])
        return parts

    def state_dict(self) -> dict[str, int]:
        """How far the stream is."""
        return {"epoch": self._epoch, "part": self._part, "place": self._place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where another stream of the same text was."""
        self._epoch, self._part, self._place = state["epoch"], state["part"], state["place"]
