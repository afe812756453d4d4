"""The bidirectional objective, as pure functions: which way a batch points, and what follows from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Tensors of a collated batch that hold the chosen rows first and the rejected rows second.
_PAIRED = ("input_ids", "attention_mask", "completion_mask", "token_type_ids")


def draw_directions(pairs: int, per: str, seed: int, step: int, micro_batch: int, rank: int) -> Tensor:
    """Draws the direction `d` in {-1, +1} of each pair of a batch.

    The draw is a function of its arguments alone, so that a resumed run goes on as if it had not stopped. All ranks
    draw for the global batch and take their part, so that it does not depend on their number.

    Args:
        pairs: Number of pairs in the batch.
        per: "batch" for one draw, "example" for one per pair.
        seed: The run's seed.
        step: Number of optimizer steps taken.
        micro_batch: Number of batches since the last of them.
        rank: Index of the process.

    Returns:
        `(pairs,)`, of -1.0 and +1.0.
    """
    generator = torch.Generator().manual_seed(_mix((seed, step, micro_batch)))
    count = (rank + 1) * pairs if per == "example" else 1
    drawn = torch.randint(0, 2, (count,), generator=generator) * 2.0 - 1.0
    return drawn[-pairs:] if per == "example" else drawn.expand(pairs)


def orient(inputs: dict[str, Any], directions: Tensor) -> dict[str, Any]:
    """Swaps chosen and rejected in the pairs that point to -1.

    A pairwise loss of the swapped pair is the loss of the pair with `d = -1`: for the sigmoid,
    `-log sigmoid(d * beta * margin)`.

    Args:
        inputs: A batch of TRL's preference collator, `(2 * pairs, ...)`, chosen first, with `ref_chosen_logps` and
            `ref_rejected_logps`, `(pairs,)`.
        directions: `(pairs,)`.

    Returns:
        The batch, oriented.
    """
    order = pair_order(directions)
    oriented = dict(inputs)
    for name in _PAIRED:
        if name in inputs:
            oriented[name] = inputs[name][order.to(inputs[name].device)]
    reference = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
    chosen, rejected = reference[order.to(reference.device)].chunk(2)
    return {**oriented, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}


def one_pair(inputs: dict[str, Any], index: int, pairs: int) -> tuple[dict[str, Any], Tensor]:
    """The batch of one pair of a batch, and the rows that it has there, `(2,)`."""
    rows = torch.tensor([index, index + pairs])
    part = {name: value[rows.to(value.device)] if name in _PAIRED else value for name, value in inputs.items()}
    reference = {name: inputs[name][index : index + 1] for name in ("ref_chosen_logps", "ref_rejected_logps")}
    return {**part, **reference}, rows


def pair_order(directions: Tensor) -> Tensor:
    """The permutation of `2 * pairs` rows that swaps the pairs which point to -1; it is its own inverse."""
    pairs = len(directions)
    chosen = torch.arange(pairs)
    swap = directions.cpu() < 0
    return torch.cat([torch.where(swap, chosen + pairs, chosen), torch.where(swap, chosen, chosen + pairs)])


def preference_margin(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    """How much more steering raised the chosen answer than the rejected one, in nats summed over tokens, `(pairs,)`."""
    return (chosen - ref_chosen) - (rejected - ref_rejected)


def _mix(key: tuple[int, ...]) -> int:
    """One seed out of several numbers (FNV-1a), so that neighbouring steps draw independently."""
    value = 0xCBF29CE484222325
    for number in key:
        for byte in (number & 0xFFFFFFFFFFFFFFFF).to_bytes(8, "little"):
            value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return value
