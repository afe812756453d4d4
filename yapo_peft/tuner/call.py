"""What steering needs to know about the current call of a model."""

from __future__ import annotations

import inspect
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._utils import as_rows
from ..errors import ConfigError, UnsupportedOperationError
from ..steering.learning import ActiveFeatures
from .claims import OUTSIDE, Claims, State

if TYPE_CHECKING:
    from .layer import YaPOLayer


class Call:
    """The current call of a model, recorded by a forward pre-hook; shared by all its steered layers.

    Attributes:
        labels: As passed to the model, `(batch, seq)`.
        attention_mask: As passed to the model.
        position_ids: As passed to the model.
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
        self._state = OUTSIDE
        self.prompt_length: int | None = None
        self.adapter_names: list[str] | None = None
        self.generation: object | None = None
        self.features: ActiveFeatures | None = None
        self.layers: list[YaPOLayer] = []
        self._prompt_mask: Any = None
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
            before = self._generate_state
            mask, repeats = kwargs.get("attention_mask"), _repeats(args, kwargs, config)
            self._generate_state = (_prompt_length(args, kwargs), mask, repeats, rows, object())
            self._seen = 0
            try:
                yield
            finally:
                self._generate_state = before

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

    def padding_mask(self, batch: int) -> Tensor | None:
        """The mask that says which tokens are padding, `(batch, seq)`; None if there is none.

        Caches of a fixed size come with masks of another form: in `generate`, it is then that of the prompt.
        """
        for mask in (self.attention_mask, self._prompt_mask):
            if isinstance(mask, Tensor) and mask.dim() == 2:
                return mask if len(mask) == batch else mask.repeat_interleave(batch // len(mask), dim=0)
        return None

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
        has_state = is_positional or inputs.get("multipliers") is not None
        if not torch.compiler.is_compiling():
            self.claims.enter_forward(has_state, self._state)
        if inputs.get("adapter_names") is not None:
            raise ConfigError("adapter_names= is a feature of PeftModel: wrap the model with get_peft_model.")
        self.labels = inputs.get("labels")
        self.attention_mask, self.position_ids = inputs.get("attention_mask"), inputs.get("position_ids")
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
        """Restores the state of before, so that direct calls of submodules don't see stale labels."""
        self._state = OUTSIDE if torch.compiler.is_compiling() else self.claims.leave_forward()

    @property
    def _generate_state(self) -> tuple[int | None, Any, int, Tensor | None, object | None]:
        """What a `generate` changes."""
        return self.prompt_length, self._prompt_mask, self._repeats, self._generate_multipliers, self.generation

    @_generate_state.setter
    def _generate_state(self, value: tuple[int | None, Any, int, Tensor | None, object | None]) -> None:
        self.prompt_length, self._prompt_mask, self._repeats, self._generate_multipliers, self.generation = value

    @property
    def _state(self) -> State:
        """What a forward pass changes."""
        return (
            self.labels, self.attention_mask, self.position_ids, self.uncounted, self.past_length, self.multipliers
        )  # fmt: skip

    @_state.setter
    def _state(self, value: State) -> None:
        (
            self.labels, self.attention_mask, self.position_ids, self.uncounted, self.past_length, self.multipliers
        ) = value  # fmt: skip


def _prompt_length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The number of prompt tokens, given the arguments of `generate`."""
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
