"""Who changes the state of a model, so that calls that overlap are right or refused."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import Lock, get_ident
from typing import Any, Literal

import torch

from ..errors import UnsupportedOperationError

# What a claim changes: the multipliers of a model, or the state of one of its calls.
Kind = Literal["multiplier", "call"]


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


# The claims of the current thread or asynchronous task, and of those that it was started from.
_OWN: ContextVar[frozenset[Claim]] = ContextVar("claims", default=frozenset())
# Not an attribute: models are copied and pickled.
_LOCK = Lock()


class Claims:
    """The claims on a model, innermost last."""

    def __init__(self) -> None:
        self._claims: list[Claim] = []
        # The threads that are within a forward pass, and whether that has a state of its own.
        self._forwards: list[tuple[int, bool]] = []

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
            self.require_free(kind)
            self._claims.append(mine)
        _OWN.set(_OWN.get() | {mine})
        try:
            yield mine
        finally:
            with _LOCK:
                self._claims.remove(mine)
            _OWN.set(_OWN.get() - {mine})

    def require_free(self, kind: Kind) -> None:
        """Raises if another thread or task changes the state that would be changed or used.

        Raises:
            UnsupportedOperationError: The two overlap.
        """
        if self.overlap(kind):
            raise _overlaps()

    def overlap(self, kind: Kind) -> bool:
        """Whether another thread or task changes the state that would be changed or used.

        A thread may call a model while another one steers it within `steering`, which may have started it to stream the
        answer. A task may not: it would have inherited the claim.
        """
        # Compiled code cannot ask which thread it runs in.
        if not self._claims or torch.compiler.is_compiling():
            return False
        own, thread = _OWN.get(), get_ident()
        others = [claim for claim in self._claims if claim not in own]
        return any(claim.kind == "call" or kind == "multiplier" or claim.thread == thread for claim in others)

    def enter_forward(self, has_state: bool) -> None:
        """Records a forward pass of this thread, until `leave_forward`.

        Args:
            has_state: Whether its multipliers, or the tokens that it steers, are its own.

        Raises:
            UnsupportedOperationError: Another thread is within a forward pass, and one of the two has such a state.
        """
        if torch.compiler.is_compiling():
            return
        me = get_ident()
        with _LOCK:
            self.require_free("call")
            others = [state for thread, state in self._forwards if thread != me]
            if any(others) or (has_state and others):
                raise _overlaps()
            self._forwards.append((me, has_state))

    def leave_forward(self) -> bool:
        """Ends the last forward pass of this thread; returns whether there is one, which was not refused."""
        if torch.compiler.is_compiling():
            return True
        me = get_ident()
        with _LOCK:
            index = next((i for i in reversed(range(len(self._forwards))) if self._forwards[i][0] == me), None)
            return index is not None and bool(self._forwards.pop(index))

    def is_steered(self) -> bool:
        """Whether the model is within `steering`."""
        return any(claim.kind == "multiplier" for claim in self._claims)

    def later(self, claim: Claim) -> Claim | None:
        """The next claim of the same kind that was entered after one, and has not ended."""
        after = self._claims[self._claims.index(claim) + 1 :]
        return next((other for other in after if other.kind == claim.kind), None)


def _overlaps() -> UnsupportedOperationError:
    return UnsupportedOperationError(
        "Another call is steering this model. Multipliers are part of its state, so calls that overlap would "
        "steer each other: let one finish before the next starts (a lock), put both into one batch with a multiplier "
        "per row, or give each its own copy of the model."
    )
