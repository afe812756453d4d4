"""Packs a batch of pairs so that no token is computed twice: each prompt once, followed by both answers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import product
from typing import Any, cast

import torch
from datasets import Dataset
from torch import Tensor, nn

from ..errors import UnsupportedOperationError
from ..tuner.blocks import hidden_size

# The columns of a preference dataset that TRL has tokenized.
TOKENIZED = ("prompt_ids", "chosen_ids", "rejected_ids")


def attention_cost(model: nn.Module, block: nn.Module) -> float:
    """The cost of attending to one token, relative to everything else that a layer computes per token."""
    return 2 * hidden_size(model) / sum(parameter.numel() for parameter in block.parameters())


@dataclass(frozen=True)
class PackedBatch:
    """A collated batch of pairs, `(2 * pairs, seq)`, laid out in other rows.

    Flat indices count its tokens without padding and with each prompt once: pair after pair, the prompt, the chosen and
    the rejected answer.

    Attributes:
        flat: Flat index of each token in rows, `(rows, length)`; the first one's where there is padding.
        is_chosen: Which tokens in rows belong to a chosen answer, `(rows, length)`.
        real: Which tokens in rows are not padding, `(rows, length)`.
        place: Index in the flattened rows of each flat token, `(tokens,)`; of the chosen row if there are two.
        input_ids: `(rows, length)`.
        labels: The answers' tokens; -100 elsewhere, `(rows, length)`.
        position_ids: `(rows, length)`, or None to leave them to the model.
        attention_mask: Which tokens each token attends to, `(rows, 1, length, length)`, or which tokens are not
            padding, `(rows, length)`.
        pairs_of_rows: The pairs in each row.
        origin: Index in the flattened rows of each token of the collated batch, `(2 * pairs, seq)`.
        scored: Whether the next token of the collated batch belongs to an answer, `(2 * pairs, seq - 1)`.
        predictors: Indices in the flattened rows of the tokens that predict those, `(scored,)`.
        targets: The predicted tokens, `(scored,)`.
        target_flat: Their flat indices, `(scored,)`.
    """

    flat: Tensor
    is_chosen: Tensor
    real: Tensor
    place: Tensor
    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor | None
    attention_mask: Tensor
    pairs_of_rows: list[list[int]]
    origin: Tensor
    scored: Tensor
    predictors: Tensor
    targets: Tensor
    target_flat: Tensor

    def inputs(self, dtype: torch.dtype) -> dict[str, Any]:
        """The model's inputs; a mask per pair of tokens becomes an additive one of the given dtype."""
        mask = self.attention_mask
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
        positions = {} if self.position_ids is None else {"position_ids": self.position_ids}
        return {"input_ids": self.input_ids, "attention_mask": mask, "labels": self.labels, **positions}


def share_prompts(inputs: dict[str, Tensor], attention_cost: float, directions: Tensor | None = None) -> PackedBatch:
    """Packs each pair as one sequence in which both answers follow the prompt and don't attend to each other.

    Args:
        inputs: A batch of TRL's preference collator.
        attention_cost: The result of `attention_cost`.
        directions: The direction of each pair, `(pairs,)`; pairs in a row have the same one. None if all do.
    """
    lengths = pair_lengths(inputs)
    sizes = lengths.sum(dim=1).tolist()
    groups = [0.0] * len(sizes) if directions is None else directions.tolist()
    rows = _cheapest_rows(sizes, groups, attention_cost)
    length = max(sum(sizes[pair] for pair in row) for row in rows)
    starts = lengths.sum(dim=1).cumsum(0) - lengths.sum(dim=1)
    flat = torch.full((len(rows), length), -1)
    pair_of, part_of, position = (torch.full((len(rows), length), fill) for fill in (-1, 0, 0))
    for index, row in enumerate(rows):
        at = 0
        for pair in row:
            here = slice(at, at + sizes[pair])
            prompt, chosen, rejected = lengths[pair].tolist()
            flat[index, here] = starts[pair] + torch.arange(sizes[pair])
            pair_of[index, here] = pair
            part_of[index, here] = torch.arange(3).repeat_interleave(lengths[pair])
            answers = (torch.arange(prompt, prompt + answer) for answer in (chosen, rejected))
            position[index, here] = torch.cat([torch.arange(prompt), *answers])
            at += sizes[pair]
    place = torch.zeros(sum(sizes), dtype=torch.long)
    place[flat[flat >= 0]] = (flat >= 0).flatten().nonzero().squeeze(-1)
    sees = (pair_of[:, :, None] == pair_of[:, None, :]) & (position[:, None, :] <= position[:, :, None])
    sees &= (part_of[:, None, :] == 0) | (part_of[:, None, :] == part_of[:, :, None])
    flat_index = flat_of(inputs, lengths)
    return _packed(inputs, flat_index, flat, place, place[flat_index], position, sees[:, None], rows)


def keep_rows(inputs: dict[str, Tensor]) -> PackedBatch:
    """Keeps the rows of a batch, for models that don't support a mask per pair of tokens."""
    attended, lengths = inputs["attention_mask"].bool(), pair_lengths(inputs)
    flat_index = flat_of(inputs, lengths)
    flat = flat_index.masked_fill(~attended.cpu(), -1)
    origin = torch.arange(flat.numel()).view_as(flat)
    place = torch.zeros(int(lengths.sum()), dtype=torch.long)
    # The chosen rows last, so that a prompt is found in its chosen row.
    for tokens, places in zip(flat.chunk(2)[::-1], origin.chunk(2)[::-1], strict=True):
        place[tokens[tokens >= 0]] = places[tokens >= 0]
    rows = [[pair] for pair in range(len(lengths))] * 2
    return _packed(inputs, flat_index, flat, place, origin, None, inputs["attention_mask"], rows)


def survey(dataset: Dataset, max_length: int | None, truncation_mode: str, name: str) -> tuple[Tensor, str]:
    """Returns the lengths of each pair's prompt and answers after truncation, `(pairs, 3)`, and a hash of their tokens.

    Raises:
        UnsupportedOperationError: Truncation would cut a pair's prompt differently for its two answers.
    """
    digest = hashlib.sha256(str(max_length).encode())
    lengths = []
    for rows in dataset.select_columns(list(TOKENIZED)).iter(1000):
        columns = [cast(dict[str, Any], rows)[column] for column in TOKENIZED]
        digest.update(json.dumps(columns).encode())
        lengths += [[len(part) for part in pair] for pair in zip(*columns, strict=True)]
    found = torch.tensor(lengths)
    if max_length is None:
        return found, digest.hexdigest()
    too_long = (found[:, :1] + found[:, 1:] > max_length).any()
    if too_long and truncation_mode != "keep_start":
        raise UnsupportedOperationError(
            f"truncation_mode={truncation_mode!r} cuts the prompts of the longest pairs of the {name} dataset "
            "differently for each answer: cache_activations needs truncation_mode='keep_start', or a larger max_length."
        )
    found[:, 1:] = torch.minimum(found[:, 1:], max_length - found[:, :1])
    return found, digest.hexdigest()


def pair_lengths(inputs: dict[str, Tensor]) -> Tensor:
    """Lengths of each pair's prompt, chosen and rejected answer in tokens, `(pairs, 3)`."""
    answers = inputs["completion_mask"].sum(dim=1)
    prompts = inputs["attention_mask"].sum(dim=1) - answers
    chosen, rejected = answers.chunk(2)
    return torch.stack([prompts.chunk(2)[0], chosen, rejected], dim=1).cpu()


def flat_of(inputs: dict[str, Tensor], lengths: Tensor) -> Tensor:
    """Flat index of each token of the collated batch, `(2 * pairs, seq)`; padding has that of the first token."""
    starts = lengths.sum(dim=1).cumsum(0) - lengths.sum(dim=1)
    column = torch.arange(inputs["input_ids"].shape[1])
    prompt, chosen = lengths[:, :1], lengths[:, 1:2]
    rejected = torch.where(column < prompt, column, column + chosen)
    index = torch.cat([column.expand_as(rejected), rejected]) + starts.repeat(2)[:, None]
    return index.masked_fill(inputs["attention_mask"].cpu() == 0, 0)


def _packed(
    inputs: dict[str, Tensor],
    flat_index: Tensor,
    flat: Tensor,
    place: Tensor,
    origin: Tensor,
    position: Tensor | None,
    attention_mask: Tensor,
    rows: list[list[int]],
) -> PackedBatch:
    device = inputs["input_ids"].device
    ids, answers = inputs["input_ids"].cpu(), inputs["completion_mask"].cpu().bool()
    attended = inputs["attention_mask"].cpu().bool()
    flat_ids = torch.zeros(len(place), dtype=ids.dtype)
    flat_ids[flat_index[attended]] = ids[attended]
    is_chosen = torch.zeros(len(place), dtype=torch.bool)
    is_chosen[flat_index.chunk(2)[0][answers.chunk(2)[0]]] = True
    flat_labels = torch.full((len(place),), -100)
    flat_labels[flat_index[answers]] = ids[answers]
    padding = flat < 0
    flat = flat.clamp(min=0)
    scored = answers[:, 1:]
    tensors = {
        "flat": flat,
        "is_chosen": is_chosen[flat] & ~padding,
        "real": ~padding,
        "place": place,
        "input_ids": flat_ids[flat],
        "labels": flat_labels[flat].masked_fill(padding, -100),
        "attention_mask": attention_mask,
        "origin": origin,
        "scored": scored,
        "predictors": origin[:, :-1][scored],
        "targets": ids[:, 1:][scored],
        "target_flat": flat_index[:, 1:][scored],
    }
    on_device = {name: tensor.to(device) for name, tensor in tensors.items()}
    positions = None if position is None else position.to(device)
    return PackedBatch(**on_device, position_ids=positions, pairs_of_rows=rows)


def _cheapest_rows(sizes: list[int], groups: list[float], attention_cost: float) -> list[list[int]]:
    """Groups pairs into rows, each within one group: fewer rows mean less padding, but longer attention."""
    members = [[pair for pair, own in enumerate(groups) if own == group] for group in dict.fromkeys(groups)]
    ways = [[_balanced(sizes, pairs, count) for count in range(1, len(pairs) + 1)] for pairs in members]

    def cost(way: tuple[tuple[list[list[int]], int], ...]) -> float:
        count, length = sum(len(rows) for rows, _ in way), max(longest for _, longest in way)
        return count * length * (1 + attention_cost * length)

    return [row for rows, _ in min(product(*ways), key=cost) for row in rows]


def _balanced(sizes: list[int], pairs: list[int], count: int) -> tuple[list[list[int]], int]:
    """Distributes pairs over `count` rows of similar length; returns the rows and the longest length."""
    rows: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for pair in sorted(pairs, key=lambda index: -sizes[index]):
        shortest = loads.index(min(loads))
        rows[shortest].append(pair)
        loads[shortest] += sizes[pair]
    return rows, max(loads)
