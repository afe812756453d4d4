"""How far steering moves a model on neutral text: the divergence from the unsteered model, with gradient."""

from __future__ import annotations

import bz2
import json
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from .._utils import evaluating
from ..errors import DatasetError
from ..tuner import steering
from ..tuner.blocks import base_of
from ..tuner.hooks import forward_hooks
from .checks import context_length
from .lm_head import head_on, logits_at, text_labels
from .pairs import chat_ids, rendering, text_of
from .upper_half import UpperHalf

# Tokens of a row that are read.
_ROW_LENGTH = 128
# Rows that run together without steering, always the same ones.
_BLOCK = 4


def packaged_text() -> list[dict[str, Any]]:
    """The neutral text that comes with the package: prose, chats, instructions, questions, code and ten languages."""
    with bz2.open(Path(__file__).with_name("neutral.jsonl.bz2"), "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def neutral_rows(
    dataset: Iterable[Any] | None, tokenizer: PreTrainedTokenizerBase, at_least: int = 1, at_most: int | None = None
) -> list[list[int]]:
    """Tokenizes neutral text, up to 128 tokens per row.

    Args:
        dataset: Strings, or rows with a column `text`, or `messages`, which the chat template renders if there is one;
            None for the text of the package.
        tokenizer: The model's tokenizer.
        at_least: Number of rows that are needed.
        at_most: Number of rows that are read; None for all.

    Raises:
        DatasetError: The dataset has too few rows, or a row has neither column, or fewer than two tokens.
    """
    rows = packaged_text() if dataset is None else dataset
    if isinstance(rows, str | Mapping):
        raise DatasetError(f"The neutral text is a {type(rows).__name__}: pass a list of texts or a dataset.")
    tokenized = (_tokenize(row, tokenizer)[:_ROW_LENGTH] for row in rows)
    if dataset is None:
        # A tokenizer of words may not know a language.
        tokenized = (ids for ids in tokenized if len(ids) > 1)
    found = list(islice(tokenized, at_most))
    if not found:
        raise DatasetError("The neutral text is empty: it has no rows.")
    if len(found) < at_least:
        raise DatasetError(f"The neutral text has {len(found)} rows: at least {at_least} are needed.")
    short = next((index for index, ids in enumerate(found) if len(ids) < 2), None)
    if short is not None:
        raise DatasetError(f"Row {short} of the neutral text has fewer than two tokens: leave it out.")
    return found


def _tokenize(row: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if isinstance(row, Mapping) and isinstance(row.get("messages"), list):
        messages = row["messages"]
        if tokenizer.chat_template:
            return chat_ids(messages, tokenizer, **rendering(row))
        row = "\n\n".join(map(text_of, messages))
    text = row.get("text") if isinstance(row, Mapping) else row
    if not isinstance(text, str):
        raise DatasetError(f"A row of the neutral text is {row!r}: must be a text, or have 'text' or 'messages'.")
    return cast(list[int], tokenizer(text)["input_ids"])


@dataclass(frozen=True)
class _Known:
    """What a row gives without steering.

    Attributes:
        hidden: Output of the lowest steered layer, `(seq, d_model)`; None if it is not kept.
        final: Input of the LM head, `(seq, d_model)`; None if the head is not where it is expected.
        form: The output of the model's body that it is from, without its tensors.
    """

    hidden: Tensor | None
    final: Tensor | None
    form: Any


@dataclass(frozen=True)
class _Batch:
    """Some rows, padded.

    Attributes:
        inputs: What the model is called with, `(rows, seq)`.
        predictors: Indices of real tokens in the flattened batch, `(tokens,)`.
        lengths: Number of tokens of each row.
        known: What the rows give without steering.
    """

    inputs: dict[str, Tensor]
    predictors: Tensor
    lengths: list[int]
    known: list[_Known]


class NeutralText:
    """The divergence of a steered model from the unsteered one on rows of neutral text.

    What steering does not change is computed when a row is first used and kept in memory: the input of the LM head,
    from which the unsteered model's predictions are one product, and with `upper` the output of the lowest steered
    layer. Rounding in it does not depend on the batch in which a row is first used.

    Args:
        model: The PEFT model.
        rows: Token ids of each row; those longer than the model's context are cut.
        device: Where batches go.
        upper: The upper half of the model, to run only that; None to run the whole model.
        keep: Whether to keep anything; not where processes must call the model in step.
        adapter_name: The adapter that steers; None for the active ones.
    """

    def __init__(
        self,
        model: Any,
        rows: list[list[int]],
        device: torch.device,
        upper: UpperHalf | None,
        keep: bool = True,
        adapter_name: str | None = None,
    ) -> None:
        self.model, self._device = model, device
        self._base = base_of(model)
        self._rows = [ids[: context_length(self._base)] for ids in rows]
        self._upper, self._keep, self._adapter_name = upper, keep, adapter_name
        self._known: dict[int, _Known] = {}

    def above(self, lowest: int) -> NeutralText:
        """The same text, with only the layers above the lowest steered one run."""
        upper = UpperHalf(self._base, lowest)
        return NeutralText(self.model, self._rows, self._device, upper, adapter_name=self._adapter_name)

    def start(self, rows: int, adapter_name: str | None = None) -> NeutralText:
        """The first rows, steered by the given adapter if there is one; what is known of them is shared."""
        start = copy(self)
        start._rows = self._rows[:rows]
        start._adapter_name = adapter_name or self._adapter_name
        return start

    def cut(self, tokens: int) -> NeutralText:
        """The same rows, and of each the first tokens."""
        short = copy(self)
        short._rows, short._known = [ids[:tokens] for ids in self._rows], {}
        return short

    def __len__(self) -> int:
        return len(self._rows)

    def divergence(self, call: Callable[..., Any], rows: Sequence[int], multipliers: Tensor) -> Tensor:
        """KL(unsteered || steered) of the next token, `(rows,)`, in nats, the mean over a row's tokens.

        Args:
            call: The model as it is called in training.
            rows: Indices of the rows; those past the end start again from the first.
            multipliers: The multiplier of each row, `(rows,)`.
        """
        batch = self._batch(rows)
        reference = self._reference(call, batch)
        uniform = bool((multipliers == multipliers[0]).all())
        with self._steering(float(multipliers[0]) if uniform else multipliers):
            steered = self._logits(call, batch)
        kl = torch.nn.functional.kl_div(
            steered.float().log_softmax(-1), reference.float().log_softmax(-1), log_target=True, reduction="none"
        ).sum(-1)
        return torch.stack([part.mean() for part in kl.split(batch.lengths)])

    def sampled_log_likelihood(self, rows: Sequence[int], seed: int) -> Tensor:
        """Log-likelihood of next tokens drawn from the unsteered model, `(rows,)`, in nats per square root of a token.

        The outer product of its gradient is, in the mean over draws, the second derivative of `divergence`.

        Args:
            rows: Indices of the rows.
            seed: Of the draws.
        """
        batch = self._batch(rows)
        with self._steering(0.0):
            found = self._logits(self.model, batch).float().log_softmax(-1)
        generator = torch.Generator(found.device).manual_seed(seed)
        # `multinomial` draws a number for each token of the vocabulary.
        shares = found.detach().exp().cumsum(-1)
        places = torch.rand(len(shares), 1, device=shares.device, generator=generator) * shares[:, -1:]
        drawn = torch.searchsorted(shares, places, right=True).clamp(max=shares.shape[-1] - 1)
        parts = found.gather(-1, drawn).squeeze(-1).split(batch.lengths)
        return torch.stack([part.sum() / len(part) ** 0.5 for part in parts])

    def _batch(self, rows: Sequence[int]) -> _Batch:
        rows = [row % len(self._rows) for row in rows]
        inputs, known = self._inputs(rows), [self._of(row) for row in rows]
        predictors = inputs["attention_mask"].flatten().nonzero().squeeze(-1)
        return _Batch(inputs, predictors, [len(self._rows[row]) for row in rows], known)

    def _inputs(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """What the model is called with, `(rows, seq)`."""
        ids = [torch.tensor(self._rows[row], device=self._device) for row in rows]
        mask = pad_sequence([torch.ones_like(part) for part in ids], batch_first=True)
        return {"input_ids": pad_sequence(ids, batch_first=True), "attention_mask": mask}

    def _steering(self, multiplier: float | Tensor) -> AbstractContextManager[None]:
        return steering(self.model, multiplier, self._adapter_name)

    @torch.no_grad()
    def _reference(self, call: Callable[..., Any], batch: _Batch) -> Tensor:
        """Logits of the unsteered model at real tokens, `(tokens, vocabulary)`."""
        finals = [row.final for row in batch.known if row.final is not None]
        with self._steering(0.0):
            if len(finals) < len(batch.known):
                return self._logits(call, batch)
            with self._final_states(torch.cat(finals).to(self._device)[None], batch.known[0].form):
                return call(**batch.inputs, use_cache=False).logits[0]

    def _logits(self, call: Callable[..., Any], batch: _Batch) -> Tensor:
        """Logits at real tokens, `(tokens, vocabulary)`, at the current multiplier."""
        below = nullcontext()
        if self._upper is not None:
            hidden = pad_sequence([cast(Tensor, row.hidden) for row in batch.known], batch_first=True)
            below = self._upper.given(hidden.to(self._device))
        with below:
            labels = text_labels(self._base, **batch.inputs)
            return logits_at(self._base, call, batch.inputs | labels, batch.predictors).logits

    def _of(self, row: int) -> _Known:
        if row not in self._known and self._keep:
            first = row - row % _BLOCK
            self._read(range(first, min(first + _BLOCK, len(self._rows))))
        return self._known.get(row, _Known(None, None, None))

    @torch.no_grad()
    def _read(self, rows: range) -> None:
        finals: list[Tensor] = []
        forms: list[Any] = [None]
        hidden: list[Tensor] = []
        below = self._upper.observed(hidden) if self._upper is not None else nullcontext()

        def find(output: Any) -> None:
            if "last_hidden_state" in output:
                finals.append(output["last_hidden_state"].detach())
                forms[0] = type(output)(**dict.fromkeys(output))

        one = torch.zeros(1, dtype=torch.long)
        hooks = forward_hooks([(self._base.base_model, find)])
        with evaluating(self.model), self._steering(0.0), below, hooks, head_on(self._base, one):
            self.model(**self._inputs(rows), use_cache=False)
        for place, row in enumerate(rows):
            length = len(self._rows[row])
            kept = (states[0][place, :length].cpu() if states else None for states in (hidden, finals))
            self._known[row] = _Known(*kept, *forms)

    @contextmanager
    def _final_states(self, states: Tensor, form: Any) -> Generator[None]:
        """Makes the model compute logits of given inputs of its LM head, `(1, tokens, d_model)`."""
        output = copy(form)
        output["last_hidden_state"] = states
        body = self._base.base_model
        own = body.__dict__.get("forward")
        body.__dict__["forward"] = lambda *args, **kwargs: output
        try:
            yield
        finally:
            if own is None:
                del body.__dict__["forward"]
            else:
                body.__dict__["forward"] = own
