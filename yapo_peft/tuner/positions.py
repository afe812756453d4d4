"""Which tokens of a text an adapter steers, said once for training, inference and serving."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ConfigError, UnsupportedOperationError

if TYPE_CHECKING:
    from .call import Call

_WINDOW = re.compile(r"(prompt|completion)(?:\[(-?\d+)?:(-?\d+)?\])?")
_FORMS = "'all', 'completion', 'last', 'prompt', or a slice of the prompt or the completion, such as 'prompt[-4:]'"


@dataclass(frozen=True)
class Span:
    """A range of tokens. None is no bound.

    Attributes:
        start: Index of the first token, counted from the start of the text.
        stop: Index at which it ends.
        after: Index of the first token, counted from the end of the prompt.
        before: Index at which it ends, counted from the end of the prompt.
    """

    start: int | None = None
    stop: int | None = None
    after: int | None = None
    before: int | None = None

    def covers(self, index: Tensor, offset: Tensor) -> Tensor:
        """Which tokens are in it, given their indices from the start, and from the end of the prompt."""
        covered = torch.ones_like(index + offset, dtype=torch.bool)
        for bound, of, is_first in (
            (self.start, index, True),
            (self.stop, index, False),
            (self.after, offset, True),
            (self.before, offset, False),
        ):
            if bound is not None:
                covered &= of >= bound if is_first else of < bound
        return covered

    def within(self, prompt_length: int) -> tuple[int, int | None]:
        """The indices of its first token and of its end, None for no end, behind a prompt of a given length."""
        first = max(self.start or 0, 0 if self.after is None else prompt_length + self.after)
        ends = [self.stop, None if self.before is None else prompt_length + self.before]
        return first, min((end for end in ends if end is not None), default=None)

    @property
    def has_prompt(self) -> bool:
        """Whether it lies in the prompt."""
        return self.before is not None and self.before <= 0


# Spans by their names. Dynamo can read a dictionary, but neither a cache nor a regular expression.
_known: dict[str, Span] = {"all": Span(), "last": Span(after=-1)}


def span_of(positions: str) -> Span:
    """The tokens that a value of `YaPOConfig.positions` names.

    Raises:
        ConfigError: It names none.
    """
    known = _known.get(positions) if isinstance(positions, str) else None
    if known is None:
        known = _known[positions] = _parse(positions)
    return known


def _parse(positions: str) -> Span:
    match = _WINDOW.fullmatch(positions) if isinstance(positions, str) else None
    if match is None:
        raise ConfigError(f"positions={positions!r}: must be {_FORMS}.")
    first, end = (int(bound) if bound else None for bound in (match[2], match[3]))
    if match[1] == "completion":
        if (first or 0) < 0 or (end or 0) < 0:
            raise ConfigError(f"positions={positions!r}: a completion is counted from its start, which has no end yet.")
        found = Span(after=first or 0, before=end)
    else:
        is_late, ends_early = first is not None and first < 0, end is not None and end < 0
        found = Span(
            start=None if is_late else first,
            stop=None if ends_early else end,
            after=first if is_late else None,
            before=end if ends_early else 0,
        )
    bounds = [(found.start, found.stop), (found.after, found.before)]
    if any(low is not None and high is not None and low >= high for low, high in bounds) or end == 0:
        raise ConfigError(f"positions={positions!r}: names no token.")
    return found


def labels_for(positions: set[str], input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Labels for text without prompts, `(batch, seq)`: it is all completion, unless some adapter steers prompts.

    Then the first half of each row is taken for a prompt.
    """
    if not any(span_of(each).has_prompt for each in positions):
        return input_ids
    counts = (torch.ones_like(input_ids) if attention_mask is None else attention_mask).cumsum(dim=1)
    return input_ids.masked_fill(counts <= counts[:, -1:] // 2, -100)


def tokens_to_steer(positions: str, hidden: Tensor, call: Call) -> Tensor | None:
    """Selects which of the current tokens an adapter steers.

    With labels, tokens with a label other than -100 are completions, and what is before them are their prompts. In
    `generate`, its input is the prompt. Otherwise, what is passed while the cache is empty is the prompt.

    Args:
        positions: A value of `YaPOConfig.positions`.
        hidden: The current hidden states, `(batch, seq, d_model)`.
        call: The current call of the model.

    Returns:
        A boolean mask `(batch, seq)`, or None for all tokens.

    Raises:
        UnsupportedOperationError: Token positions are unknown, and there are no labels.
    """
    if positions == "all":
        return None
    span, (batch, seq) = span_of(positions), hidden.shape[:2]
    if call.labels is not None:
        index, offset, is_part = _labelled(call, hidden.device)
        return span.covers(index, offset) & is_part
    if call.uncounted:
        raise UnsupportedOperationError(
            f"positions={positions!r} cannot tell prompts and answers apart where several sequences are packed into a "
            "row (generate_batch), the model keeps a state instead of a cache (Mamba, RWKV), or it is called within "
            "its own generate (guidance_scale, logits processors): use an adapter of positions='all', or, for a state, "
            "generate with use_cache=False."
        )
    past_length = int(call.past_length)
    index = past_length + torch.arange(seq, device=hidden.device)
    if call.prompt_length is None and past_length > 0:
        return _step_outside_generate(positions, index, past_length + seq, call.padding_mask(batch)).expand(batch, seq)
    prompt_length = past_length + seq if call.prompt_length is None else call.prompt_length
    first, end = _attended(call.padding_mask(batch), prompt_length, hidden.device)
    is_answer = index >= prompt_length
    covered = span.covers(index - first, torch.where(is_answer, index - prompt_length, index - end))
    # What is between the end of a prompt and the completions is padding.
    return (covered & (is_answer | (index < end))).expand(batch, seq)


def _step_outside_generate(positions: str, index: Tensor, end: int, mask: Tensor | None) -> Tensor:
    """Which tokens behind a cache are steered, where nothing says how long the prompt was."""
    span = span_of(positions)
    if span.has_prompt:
        return torch.zeros_like(index, dtype=torch.bool)
    if positions == "last":
        return index == _attended(mask, end, index.device)[1] - 1
    if span.before is not None or span.after:
        raise UnsupportedOperationError(
            f"positions={positions!r} counts tokens from the end of the prompt, which is not known here: use generate."
        )
    return torch.ones_like(index, dtype=torch.bool)


def _labelled(call: Call, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each token, its index from the start of its prompt, and from the end of it, `(batch, seq)`.

    The third tensor says which tokens are part of a prompt or a completion: padding is not, nor what none follows.
    """
    scored = call.labels.to(device) != -100  # pyright: ignore[reportOptionalMemberAccess]
    batch, seq = scored.shape
    mask = call.attention_mask
    is_padding = torch.zeros_like(scored)
    if isinstance(mask, Tensor) and mask.shape == scored.shape:
        is_padding = mask.to(device) == 0
    place = torch.arange(seq, device=device).expand(batch, seq)
    prompt = ~scored & ~is_padding
    # Where positions start again, another text of the row does, or, where answers share a prompt, another answer.
    again = torch.zeros_like(scored)
    if call.position_ids is not None and call.position_ids.shape == scored.shape:
        positions = call.position_ids.to(device)
        again[:, 1:] = positions[:, 1:] <= positions[:, :-1]
    start = _last_begin(prompt, again, place)
    begun = _last_begin(scored, again, place)
    ends = torch.where(scored, place, seq + place).flip(1).cummin(dim=1).values.flip(1)
    offset = torch.where(scored, place - begun, place - ends)
    texts = again.cumsum(dim=1)
    is_prompt = prompt & (ends < seq) & (texts == texts.gather(1, ends.clamp(max=seq - 1)))
    return torch.where(prompt, place - start, place), offset, scored | is_prompt


def _last_begin(part: Tensor, again: Tensor, place: Tensor) -> Tensor:
    """The index at which the current stretch of a part begins, `(batch, seq)`."""
    behind = torch.nn.functional.pad(part[:, :-1], (1, 0))
    return torch.where(part & (~behind | again), place, 0).cummax(dim=1).values


def _attended(attention_mask: Tensor | None, end: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Index of the first attended token among the first `end` of each row, and that after the last one.

    They are `(batch, 1)`, or of all rows, `(1,)`.
    """
    if attention_mask is None:
        return torch.tensor([0], device=device), torch.tensor([end], device=device)
    if attention_mask.shape[1] < end:  # of a prompt that is passed in parts
        first = (attention_mask.to(device) != 0).int().argmax(dim=1, keepdim=True)
        return first, torch.tensor([end], device=device)
    attended = attention_mask[:, :end].to(device) != 0
    last = (attended * torch.arange(end, device=device)).argmax(dim=1, keepdim=True)
    return attended.int().argmax(dim=1, keepdim=True), last + 1
