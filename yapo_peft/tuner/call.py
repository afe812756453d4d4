"""What steering needs to know about the current call of a model, of which there is one at a time."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import Lock, get_ident
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..errors import ConfigError, UnsupportedOperationError
from ..steering.learning import ActiveFeatures

if TYPE_CHECKING:
    from .layer import YaPOLayer


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

        A thread may call a model while another one steers it within `steering`, which may have started it to stream the
        answer. A task may not: it would have inherited the claim.

        Raises:
            UnsupportedOperationError: The two overlap.
        """
        # Compiled code cannot ask which thread it runs in.
        if not self._claims or torch.compiler.is_compiling():
            return
        own, thread = _OWN.get(), get_ident()
        others = [claim for claim in self._claims if claim not in own]
        if any(claim.kind == "call" or kind == "multiplier" or claim.thread == thread for claim in others):
            raise _overlaps()

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


class Call:
    """The current call of a model, recorded by a forward pre-hook; shared by all its steered layers.

    Attributes:
        labels: As passed to the model, `(batch, seq)`.
        attention_mask: As passed to the model.
        uncounted: Whether token positions are unknown: several sequences are packed into a row, or the model keeps a
            state instead of a cache.
        past_length: Number of tokens in the cache.
        prompt_length: Number of prompt tokens in `generate`; None outside of it.
        adapter_names: The adapter of each row, "__base__" for none; None if the active ones steer every row.
        multipliers: A multiplier for each row, `(batch,)`, or one for all, which overrides those of the adapters.
        generation: Identifies the `generate` that the current call is a step of; None outside of it.
        features: The features at the lowest steered layer, if they are known already.
        layers: The steered layers of the model, from the bottom up.
    """

    def __init__(self, model: nn.Module) -> None:
        self.claims = Claims()
        self._names = list(inspect.signature(type(model).forward).parameters)[1:]
        self.labels: Tensor | None = None
        self.attention_mask: Tensor | None = None
        self.uncounted = False
        self.past_length: int | Tensor = 0
        self.prompt_length: int | None = None
        self.adapter_names: list[str] | None = None
        self.multipliers: Tensor | None = None
        self.generation: object | None = None
        self.features: ActiveFeatures | None = None
        self.layers: list[YaPOLayer] = []
        self._generate_multipliers: Tensor | None = None
        self._repeats = 1
        # Length of the last step's input without a cache, within `generate`.
        self._seen = 0
        head = getattr(model, "get_output_embeddings", lambda: None)()
        self._predicts_tokens = head is not None
        self._handles = [
            model.register_forward_pre_hook(self._observe, with_kwargs=True),
            model.register_forward_hook(self._forget, always_call=True),
        ]

    def remove(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()

    def require_labels(self, positions: str) -> None:
        """Checks that training can tell which tokens to steer.

        Raises:
            UnsupportedOperationError: The tokens depend on labels, and the model is called without any.
        """
        if positions == "all" or self.labels is not None or (positions == "last" and not self._predicts_tokens):
            return
        raise UnsupportedOperationError(
            f"positions={positions!r} finds the tokens of the answer by their labels, and this call in training mode "
            "has none. Use positions='all', or a trainer that passes labels (SFT, DPO, KTO, GRPO). For inference, "
            "call model.eval()."
        )

    @contextmanager
    def generating(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], config: Any, multipliers: Any
    ) -> Generator[None]:
        """Treats the calls in a `with` block as steps of one `generate`, given its arguments and the model's config."""
        rows = as_rows(multipliers)
        with self.claims.claim("call"):
            before = self.prompt_length, self._repeats, self._generate_multipliers, self.generation
            self.prompt_length, self._repeats = _prompt_length(args, kwargs), _repeats(args, kwargs, config)
            self._generate_multipliers, self.generation, self._seen = rows, object(), 0
            try:
                yield
            finally:
                self.prompt_length, self._repeats, self._generate_multipliers, self.generation = before

    @contextmanager
    def routing(self, adapter_names: list[str]) -> Generator[None]:
        """Steers each row of the calls in a `with` block with the adapter named for it."""
        with self.claims.claim("call"):
            before, self.adapter_names = self.adapter_names, adapter_names
            try:
                yield
            finally:
                self.adapter_names = before

    @contextmanager
    def knowing(self, features: ActiveFeatures) -> Generator[None]:
        """Uses known features at the lowest steered layer for the calls in a `with` block."""
        with self.claims.claim("call"):
            self.features = features
            try:
                yield
            finally:
                self.features = None

    def rows_of(self, adapter_name: str, batch: int) -> list[int] | None:
        """Returns the rows that an adapter steers; None for all of them."""
        if self.adapter_names is None:
            return None
        repeats = self._repeats_of(len(self.adapter_names), batch, "adapter_names")
        return [row for row in range(batch) if self.adapter_names[row // repeats] == adapter_name]

    def per_row(self, multipliers: Tensor, batch: int) -> Tensor:
        """Repeats multipliers as `generate` repeats the rows of the caller's batch; a single one is for all rows."""
        if multipliers.dim() == 0:
            return multipliers.expand(batch)
        return multipliers.repeat_interleave(self._repeats_of(len(multipliers), batch, "multiplier"))

    def _repeats_of(self, given: int, batch: int, name: str) -> int:
        if given == batch:
            return 1
        if given * self._repeats == batch:
            return self._repeats
        raise ConfigError(
            f"{name} has {given} values for a batch of {batch} rows: give one per row. (Beam search and "
            "num_return_sequences repeat each row; a model without PeftModel around it needs its values repeated too.)"
        )

    def _observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        inputs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        is_positional = any(positions != "all" for layer in self.layers for positions in layer.positions.values())
        self.claims.enter_forward(is_positional or inputs.get("multipliers") is not None)
        if inputs.get("adapter_names") is not None:
            raise ConfigError("adapter_names= is a feature of PeftModel: wrap the model with get_peft_model.")
        self.labels = inputs.get("labels")
        self.attention_mask = inputs.get("attention_mask")
        self.uncounted = any(inputs.get(name) is not None for name in ("cu_seq_lens_q", "cache_params"))
        past = inputs.get("past_key_values")
        if past is None and self.prompt_length is not None:
            # Without a cache each step is longer than the last one, unless the model keeps a state somewhere.
            tokens = inputs.get("input_ids") if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
            length = 0 if tokens is None else tokens.shape[1]
            self.uncounted, self._seen = self.uncounted or length <= self._seen, length
        # Some caches keep their length in a tensor that the call changes in place.
        self.past_length = 0 if past is None else past.get_seq_length() + 0
        multipliers = inputs.get("multipliers")
        self.multipliers = self._generate_multipliers if multipliers is None else as_rows(multipliers)
        return args, {name: value for name, value in kwargs.items() if name != "multipliers"}

    def _forget(self, module: nn.Module, args: Any, output: Any) -> None:
        """Clears per-call state, so that direct calls of submodules don't see stale labels."""
        if not self.claims.leave_forward():
            return  # this call was refused
        self.labels = self.attention_mask = self.multipliers = None
        self.uncounted = False
        self.past_length = 0


def _prompt_length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    candidates = (kwargs.get("inputs_embeds"), args[0] if args else None, kwargs.get("inputs"), kwargs.get("input_ids"))
    # Without a prompt, `generate` starts from the BOS token.
    return next((int(inputs.shape[1]) for inputs in candidates if inputs is not None), 1)


def _repeats(args: tuple[Any, ...], kwargs: dict[str, Any], config: Any) -> int:
    """How often `generate` repeats each row: its arguments come first, then its config, then the model's."""
    given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
    return max(
        next((n for n in (kwargs.get(name), getattr(given, name, None), getattr(config, name, None)) if n), 1)
        for name in ("num_beams", "num_return_sequences")
    )


def as_rows(multipliers: Tensor | Sequence[float] | float | None) -> Tensor | None:
    """Converts multipliers to a tensor: one per row, `(batch,)`, or one for all rows, `()`.

    Raises:
        ConfigError: The multipliers are not finite numbers in float32.
    """
    if multipliers is None:
        return None
    message = f"multipliers={multipliers!r}: give one finite number per row of the batch, (batch,), or one for all."
    try:
        rows = torch.as_tensor(multipliers)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ConfigError(message) from error
    if rows.dim() > 1 or rows.dtype == torch.bool or rows.is_complex() or not rows.float().isfinite().all():
        raise ConfigError(message)
    return rows
