"""The bidirectional objective as pure functions: directions of pairs, and losses of oriented pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .._utils import mixed_seed
from ..errors import ConfigError

# Tensors of a collated batch that hold the chosen rows first and the rejected rows second.
_PAIRED = ("input_ids", "attention_mask", "completion_mask", "token_type_ids")


@dataclass(frozen=True)
class OrientedPairs:
    """A batch of pairs, oriented by their directions, as an objective gets it; each tensor is `(pairs,)`.

    With direction +1, the chosen answer is the winning one, and the multiplier is +1; with direction -1, the rejected
    answer is the winning one, and the multiplier is -1.

    Attributes:
        winning: Log-probability of the winning answer, in nats summed over its tokens, with gradient.
        losing: Log-probability of the losing answer.
        ref_winning: `winning` without steering; zeros with `reference="none"`.
        ref_losing: `losing` without steering.
        winning_tokens: Number of tokens of the winning answer.
        losing_tokens: Number of tokens of the losing answer.
    """

    winning: Tensor
    losing: Tensor
    ref_winning: Tensor
    ref_losing: Tensor
    winning_tokens: Tensor
    losing_tokens: Tensor

    @classmethod
    def of(cls, log_probs: Tensor, inputs: dict[str, Any], rows: Tensor) -> OrientedPairs:
        """Orients a batch and the log-probabilities of its answers' tokens, `(2 * pairs, seq - 1)`."""
        inputs = take_pairs(inputs, rows)
        tokens = inputs["completion_mask"][:, 1:].sum(dim=1).chunk(2)
        winning, losing = log_probs[rows.to(log_probs.device)].sum(dim=1).chunk(2)
        return cls(winning, losing, inputs["ref_chosen_logps"], inputs["ref_rejected_logps"], *tokens)


Objective = Callable[[OrientedPairs], Tensor]


def reps(pairs: OrientedPairs) -> Tensor:
    """The loss of RePS, `(pairs,)`: likelihoods per token, not anchored to a reference.

        -log sigmoid(w / |y_w| * log p(y_w) - 1 / |y_l| * log p(y_l)),  w = max(log ref(y_l) - log ref(y_w), 1)

    The unsteered model only determines the constant `w`, which gives more weight to answers that it finds unlikely. The
    paper's negative direction is a projection; here it is multiplier -1, as in all objectives.

    Source: arXiv 2505.20809, section 3 (the loss of both directions).
    """
    weight = (pairs.ref_losing - pairs.ref_winning).clamp(min=1)
    return -logsigmoid(weight * pairs.winning / pairs.winning_tokens - pairs.losing / pairs.losing_tokens)


def loss_of_each(objective: Objective, pairs: OrientedPairs) -> Tensor:
    """The loss of each pair, `(pairs,)`.

    Raises:
        ConfigError: The objective does not return one loss per pair.
    """
    losses = objective(pairs)
    if not isinstance(losses, Tensor) or losses.shape != pairs.winning.shape:
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ConfigError(
            f"The objective returned {shape} for {len(pairs.winning)} pairs: return one loss per pair, not their mean."
        )
    return losses


# Values of `loss_type` that TRL does not have.
OBJECTIVES: dict[str, Objective] = {"reps": reps}


def chosen_objective(given: Objective | None, args: Any) -> Objective | None:
    """The loss of a run if it is not one of TRL's.

    Args:
        given: A custom loss.
        args: The training config.

    Raises:
        ConfigError: Both are given, or options would change TRL's losses.
    """
    chosen = given or OBJECTIVES.get(args.loss_type[0])
    if given is not None and args.loss_type != ["sigmoid"]:
        raise ConfigError(f"objective= and loss_type={args.loss_type!r} are both given: keep one of them.")
    if chosen is not None:
        args.require_plain_loss()
    return chosen


def draw_directions(pairs: int, per: str, seed: int, step: int, micro_batch: int, rank: int) -> Tensor:
    """Draws the direction `d` in {-1, +1} of each pair of a batch.

    The draw only depends on the arguments, so that a resumed run continues as if it had not stopped. All ranks draw for
    the global batch and take their part, so that it does not depend on their number.

    Args:
        pairs: Number of pairs in the batch.
        per: "batch" for one draw, "example" for one per pair.
        seed: The run's seed.
        step: Number of optimizer steps taken.
        micro_batch: Number of batches since the last step.
        rank: Index of the process.

    Returns:
        `(pairs,)`, each -1.0 or +1.0.
    """
    generator = torch.Generator().manual_seed(mixed_seed(seed, step, micro_batch))
    count = (rank + 1) * pairs if per == "example" else 1
    drawn = torch.randint(0, 2, (count,), generator=generator) * 2.0 - 1.0
    return drawn[-pairs:] if per == "example" else drawn.expand(pairs)


class Draws:
    """Draws the directions of each batch of a run, and numbers the batches.

    Args:
        args: The training config.
        rank: Index of this process.
    """

    def __init__(self, args: Any, rank: int) -> None:
        self._per, self._micro_batches, self._rank = args.direction, args.gradient_accumulation_steps, rank
        self._seed = args.data_seed if args.data_seed is not None else args.seed
        self.restart()

    def restart(self) -> None:
        """Forgets the last batch, which a run that failed may repeat."""
        self._step, self._micro_batch = -1, 0

    def next(self, pairs: int, step: int) -> list[Tensor]:
        """The directions of the next batch, `(pairs,)` each -1.0 or +1.0; two of them if each pair gets both.

        Args:
            pairs: Number of pairs in the batch.
            step: Number of optimizer steps taken.
        """
        self._micro_batch = self._micro_batch + 1 if step == self._step else 0
        self._step = step
        if self._per == "both":
            return [torch.ones(pairs), -torch.ones(pairs)]
        return [draw_directions(pairs, self._per, self._seed, step, self._micro_batch, self._rank)]

    @property
    def batch(self) -> int:
        """Number of the current global batch in the run."""
        return self._step * self._micro_batches + self._micro_batch


def take_pairs(inputs: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """Takes rows of a batch of pairs: all of them in another order, or those of one pair.

    A pairwise loss of a pair with its answers swapped is the pair's loss with `d = -1`: for the sigmoid,
    `-log sigmoid(d * beta * margin)`.

    Args:
        inputs: A batch of TRL's preference collator, `(2 * pairs, ...)`, chosen first, with `ref_chosen_logps` and
            `ref_rejected_logps`, `(pairs,)`.
        rows: Indices of the rows, those of the chosen answers first.
    """
    reference = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
    chosen, rejected = reference[rows.to(reference.device)].chunk(2)
    paired = {name: inputs[name][rows.to(inputs[name].device)] for name in _PAIRED if name in inputs}
    return {**inputs, **paired, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}


def pair_order(directions: Tensor) -> Tensor:
    """The permutation of `2 * pairs` rows that swaps pairs with direction -1; it is its own inverse."""
    pairs = len(directions)
    chosen = torch.arange(pairs)
    swap = directions.cpu() < 0
    return torch.cat([torch.where(swap, chosen + pairs, chosen), torch.where(swap, chosen, chosen + pairs)])


def preference_margin(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    """How much more steering raises the chosen answer than the rejected one, `(pairs,)`, in nats summed over tokens."""
    return (chosen - ref_chosen) - (rejected - ref_rejected)
