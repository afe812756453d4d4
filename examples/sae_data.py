"""Turns text into the activations that train_sae.py trains and evaluates an SAE on."""

from __future__ import annotations

import csv
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from yapo_peft.tuner.blocks import decoder_blocks, hidden_states

OUTLIER_FACTOR = 10  # tokens with more than ten times the median norm are attention sinks and are excluded


@dataclass
class Activations:
    """Outputs of one layer for many tokens.

    Attributes:
        values: `(tokens, d_model)` in float16, memory-mapped.
        kept: Indices of the tokens that are neither the first of their sequence nor outliers.
        limit: Norm from which a token counts as an outlier.
    """

    values: np.memmap
    kept: Tensor
    limit: float

    def rows(self, indices: Tensor) -> Tensor:
        """The kept tokens at `indices`, `(len(indices), d_model)`, in float32."""
        return torch.from_numpy(self.values[self.kept[indices].numpy()]).float()


def read_documents(source: str) -> Iterator[str | list[dict[str, str]]]:
    """Yields the documents of a source: plain texts, or chats with one question and one answer.

    A source is one of

    - a .txt file, read as one document,
    - a .jsonl or .csv file with a "text" column,
    - `file:question_column:answer_column[,answer_column]`, a .jsonl or .csv file with questions and answers,
    - `hub:name[:split[:column]]`, a dataset on the Hub.
    """
    if source.startswith("hub:"):
        from datasets import load_dataset

        name, split, column = (source.split(":") + ["train", "text"][source.count(":") - 1 :])[1:4]
        yield from (row[column] for row in load_dataset(name, split=split, streaming=True))
        return
    file, *columns = source.split(":")
    path = Path(file)
    if path.suffix == ".txt":
        yield path.read_text()
        return
    with path.open(newline="") as lines:
        rows = csv.DictReader(lines) if path.suffix == ".csv" else map(json.loads, lines)
        for row in rows:
            if not columns:
                yield row["text"]
                continue
            for answer in columns[1].split(","):
                yield [
                    {"role": "user", "content": row[columns[0]]},
                    {"role": "assistant", "content": row[answer]},
                ]


def token_sequences(sources: list[str], tokenizer: Any, length: int, holdout: float, limit: int) -> tuple[list, list]:
    """Token sequences for training and for evaluation; the end of each source is held out for evaluation."""
    train, held_out = [], []
    for source in sources:
        sequences: list[list[int]] = []
        read = 0
        for document in read_documents(source):
            if isinstance(document, str):
                ids = tokenizer(document, verbose=False)["input_ids"]
                pieces = [ids[i : i + length] for i in range(0, len(ids), length)]
            else:
                rendered = tokenizer.apply_chat_template(document, tokenize=False)
                pieces = [tokenizer(rendered, add_special_tokens=False)["input_ids"][:length]]
            # The first token is never trained on, so very short pieces are not worth running.
            sequences += [piece for piece in pieces if len(piece) > 8]
            read += sum(map(len, pieces))
            if read >= limit:
                break
        cut = len(sequences) - max(1, round(len(sequences) * holdout))
        train += sequences[:cut]
        held_out += sequences[cut:]
    if not train:
        raise ValueError(f"Not enough text to train on in {sources}: pass more or longer documents.")
    return train, held_out


def batches(sequences: list[list[int]], tokens: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields input ids and attention mask, `(batch, seq)`, of sequences grouped by length, in random order."""
    grouped: list[list[list[int]]] = [[]]
    for sequence in sorted(sequences, key=len):
        if grouped[-1] and (len(grouped[-1]) + 1) * len(sequence) > tokens:
            grouped.append([])
        grouped[-1].append(sequence)
    random.Random(seed).shuffle(grouped)
    for group in grouped:
        rows = [torch.tensor(sequence) for sequence in group]
        mask = [torch.ones_like(row) for row in rows]
        yield (
            torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
            torch.nn.utils.rnn.pad_sequence(mask, batch_first=True),
        )


def cached_activations(
    model: Any, layer: int, sequences: list[list[int]], folder: Path, bf16: bool, name: str
) -> Activations:
    """Runs the model up to a layer and caches the layer's output on disk, where later runs find it."""
    key = hashlib.sha256(json.dumps([model.name_or_path, layer, bf16, sequences]).encode()).hexdigest()[:16]
    path = folder / f"activations-{key}.f16"
    total, width = sum(map(len, sequences)), model.config.get_text_config().hidden_size
    first = torch.zeros(total, dtype=torch.bool)
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        store, filled = np.memmap(partial, np.float16, "w+", shape=(total, width)), 0
        with tqdm(
            total=total, desc=f"Activations of layer {layer} ({name})", unit="token", unit_scale=True
        ) as progress:
            for ids, mask in batches(sequences, 8192):
                values = run_to_layer(model, layer, ids, mask, bf16)[mask.bool()].half().cpu()
                store[filled : filled + len(values)] = values.numpy()
                filled += len(values)
                progress.update(len(values))
        store.flush()
        partial.rename(path)
    filled = 0
    for _, mask in batches(sequences, 8192):
        lengths = mask.sum(1)
        first[filled + torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)[:-1]])] = True
        filled += int(lengths.sum())
    values = np.memmap(path, np.float16, "r", shape=(total, width))
    parts = (torch.from_numpy(values[i : i + 65536].copy()) for i in range(0, total, 65536))
    norms = torch.cat([part.float().norm(dim=1) for part in parts])
    limit = OUTLIER_FACTOR * float(norms.median())
    return Activations(values, torch.nonzero(~first & (norms < limit)).squeeze(1), limit)


class _LayerReached(Exception):  # noqa: N818  a signal, not an error
    """Ends the forward pass at the requested layer."""


@torch.no_grad()
def run_to_layer(model: Any, layer: int, ids: Tensor, mask: Tensor, bf16: bool) -> Tensor:
    """Output of a layer, `(batch, seq, d_model)`, without running the layers above it."""
    caught: list[Tensor] = []

    def catch(module: Any, args: Any, output: Any) -> None:
        caught.append(hidden_states(output))
        raise _LayerReached

    handle = decoder_blocks(model)[1][layer].register_forward_hook(catch)
    try:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False)
    except _LayerReached:
        pass
    finally:
        handle.remove()
    return caught[0]


@torch.no_grad()
def spliced_loss(
    model: Any, layer: int, sequences: list[list[int]], limit: float, replace: Callable[[Tensor], Tensor] | None
) -> float:
    """Mean next-token loss in nats, with the layer's output replaced at all tokens except the first and outliers."""
    total, count = 0.0, 0
    for ids, mask in batches(sequences, 2048):
        keep = mask.bool().clone()
        keep[:, 0] = False

        def splice(module: Any, args: Any, output: Any, keep: Tensor = keep) -> Any:
            hidden = hidden_states(output)
            replaced = (keep & (hidden.norm(dim=-1) < limit))[..., None]
            spliced = torch.where(replaced, replace(hidden), hidden) if replace is not None else hidden
            return spliced if isinstance(output, Tensor) else (spliced, *output[1:])

        handle = decoder_blocks(model)[1][layer].register_forward_hook(splice)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        handle.remove()
        scored = mask[:, 1:].bool()
        total += float(torch.nn.functional.cross_entropy(logits[scored].float(), ids[:, 1:][scored], reduction="sum"))
        count += int(scored.sum())
    return total / count
