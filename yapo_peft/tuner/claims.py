"""Who uses or changes the state of a model: threads and tasks whose calls would steer each other are refused."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import Lock, get_ident
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import UnsupportedOperationError

# What a claim changes: the multipliers of a model, or the state of one of its calls.
Kind = Literal["multiplier", "call"]
# Of a call: the labels, the attention mask, the position ids, whether positions are unknown, the length of the cache,
# the multipliers.
State = tuple[Tensor | None, Tensor | None, Tensor | None, bool, int | Tensor, Tensor | None]
OUTSIDE: State = (None, None, None, False, 0, None)


@dataclass(eq=False)
class Claim:
    """A `with` block that changes the state of a model.

    Attributes:
        kind: What it changes.
        before: The state that is restored after it.
        thread: The thread that entered it.
    """

    kind: Kind
    before: Any = None
    thread: int = field(default_factory=get_ident)


@dataclass(eq=False)
class Forward:
    """A forward pass of a model.

    Attributes:
        frame: The frame that calls its hooks.
        has_state: Whether its multipliers, or the tokens that it steers, are its own.
        before: The state to restore after it.
        thread: The thread that runs it.
    """

    frame: FrameType
    has_state: bool
    before: State
    thread: int = field(default_factory=get_ident)

    def is_running(self) -> bool:
        """Whether it has not ended; an interrupt ends it without a hook that says so."""
        frame = sys._current_frames().get(self.thread)  # pyright: ignore[reportPrivateUsage]
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is not None


# The claims of the current thread or asynchronous task, and of those that it was started from.
_OWN: ContextVar[frozenset[Claim]] = ContextVar("claims", default=frozenset())
# Not an attribute: models are copied and pickled.
_LOCK = Lock()


class Claims:
    """The claims on a model, innermost last."""

    def __init__(self) -> None:
        self._claims: list[Claim] = []
        self._forwards: list[Forward] = []

    def __reduce__(self) -> tuple[type[Claims], tuple[()]]:
        # Copies and pickles are nobody's yet.
        return Claims, ()

    @contextmanager
    def claim(self, kind: Kind) -> Generator[Claim]:
        """Claims the model's state within a `with` block.

        Raises:
            UnsupportedOperationError: As `require_free`.
        """
        mine = Claim(kind)
        with _LOCK:
            self._require_free(kind)
            self._claims.append(mine)
        _OWN.set(_OWN.get() | {mine})
        try:
            yield mine
        finally:
            with _LOCK:
                self._claims.remove(mine)
            _OWN.set(_OWN.get() - {mine})

    def require_free(self, kind: Kind) -> None:
        """Checks that no other thread or task changes or uses what would be changed.

        Raises:
            UnsupportedOperationError: One does.
        """
        with _LOCK:
            self._require_free(kind)

    def _require_free(self, kind: Kind | None) -> None:
        """As `require_free`; a forward pass without a state of its own changes nothing.

        A thread may call a model while another one steers it within `steering`, which may have started it to stream the
        answer. A task may not: it would have inherited the claim.
        """
        # Compiled code cannot ask which thread it runs in.
        if torch.compiler.is_compiling():
            return
        own, thread = _OWN.get(), get_ident()
        others = [claim for claim in self._claims if claim not in own]
        running = [forward for forward in self._forwards if forward.thread != thread and forward.is_running()]
        if any(claim.kind == "call" or kind == "multiplier" or claim.thread == thread for claim in others) or any(
            kind is not None or forward.has_state for forward in running
        ):
            raise UnsupportedOperationError(
                "Another call is steering this model, or running in it. Multipliers are part of the model's state, so "
                "calls that overlap would steer each other: let one finish before the next starts (a lock), put both "
                "into one batch with a multiplier per row, or give each its own copy of the model."
            )

    def enter_forward(self, has_state: bool, state: State) -> None:
        """Records a forward pass of this thread, until `leave_forward`, which has to follow also if this raises.

        Args:
            has_state: Whether its multipliers, or the tokens that it steers, are its own.
            state: The state of the call.

        Raises:
            UnsupportedOperationError: Another thread is within a forward pass, and one of the two has its own state.
        """
        with _LOCK:
            me, mine = get_ident(), sys._getframe(2)  # pyright: ignore[reportPrivateUsage]
            self._forwards = [other for other in self._forwards if other.thread != me or other.is_running()]
            is_nested = any(other.thread == me for other in self._forwards)
            forward = Forward(mine, False, state)
            self._forwards.append(forward)
            self._require_free("call" if has_state else None)
            forward.has_state, forward.before = has_state, state if is_nested else OUTSIDE

    def leave_forward(self) -> State:
        """Ends the last forward pass of this thread; returns the state to restore."""
        with _LOCK:
            last = next((forward for forward in reversed(self._forwards) if forward.thread == get_ident()), None)
            if last is None:  # another pre-hook failed before this call was recorded
                return OUTSIDE
            self._forwards.remove(last)
            return last.before

    def is_steered(self) -> bool:
        """Whether the model is within `steering`."""
        return any(claim.kind == "multiplier" for claim in self._claims)

    def later(self, claim: Claim) -> Claim | None:
        """The next claim of the same kind that was entered after one, and has not ended."""
        after = self._claims[self._claims.index(claim) + 1 :]
        return next((other for other in after if other.kind == claim.kind), None)
