"""Finds the tokens that a direction promotes, with the model's final norm and unembedding."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .._utils import evaluating
from ..errors import UnsupportedOperationError
from ..tuner import steering
from ..tuner.hooks import forward_hooks
from .texts import base_of

# Directions whose logits are held at once.
_ROWS = 64


class Unembedding:
    """The end of a causal language model, as it acts on directions of the residual stream.

    Each direction goes through the final norm alone, as if the residual stream were nothing else, and then through the
    head. That is exact for the direction's ranking of tokens up to the norm's dependence on what else is there; what
    the layers in between make of it is left out.

    Args:
        model: A model with a YaPO adapter.

    Raises:
        UnsupportedOperationError: The model has no head, or something else than one module between its last layer and
            its head.

    Source: the logit lens.
    """

    def __init__(self, model: nn.Module) -> None:
        base = base_of(model)
        self._head: Any = base.get_output_embeddings()
        if self._head is None:
            raise UnsupportedOperationError(
                f"{type(base).__name__} has no head that turns hidden states into tokens: promoted tokens need a "
                "causal language model."
            )
        self._norm: Any = _final_norm(model, base)

    @torch.no_grad()
    def logits(self, directions: Tensor) -> Tensor:
        """What directions, `(n, d_model)`, do to logits, `(n, vocabulary)` in float32, less the mean over tokens."""
        parameter = next(self._head.parameters())
        found: list[Tensor] = []
        for part in directions.split(_ROWS):
            # Long enough that the norm's epsilon, and any bias before it, does not matter.
            part = nn.functional.normalize(part.float(), dim=-1) * 100 * part.shape[-1] ** 0.5
            part = part.to(parameter.device, parameter.dtype)
            nothing = torch.zeros_like(part[:1])
            moved = self._norm(part) - self._norm(nothing) if self._norm is not None else part
            logits = (self._head(moved) - self._head(nothing)).float()
            found.append(logits - logits.mean(dim=-1, keepdim=True))
        return torch.cat(found)

    def tokens(
        self, directions: Tensor, tokenizer: PreTrainedTokenizerBase, count: int
    ) -> tuple[list[list[str]], list[list[str]]]:
        """The texts of the tokens that each direction, `(n, d_model)`, raises and lowers the most."""
        known = min(len(tokenizer), self._head.weight.shape[0])
        promotes: list[list[str]] = []
        suppresses: list[list[str]] = []
        for part in directions.split(_ROWS):
            logits = self.logits(part)[:, :known]
            for chosen, texts in ((logits, promotes), (-logits, suppresses)):
                texts += [
                    [tokenizer.decode([i]) for i in row] for row in chosen.topk(min(count, known)).indices.tolist()
                ]
        return promotes, suppresses


def _final_norm(model: nn.Module, base: Any) -> nn.Module | None:
    """The module whose output is the decoder's, found by running one token; None where that is the last block."""
    decoder = base.get_decoder()
    outputs: list[tuple[nn.Module, Any]] = []

    def keep(module: nn.Module, output: Any) -> None:
        outputs.append((module, output))

    candidates = [
        module for module in decoder.modules() if not isinstance(module, nn.ModuleList) and module is not decoder
    ]
    keeping = forward_hooks((module, partial(keep, module)) for module in candidates)
    ids = torch.zeros(1, 1, dtype=torch.long, device=base.get_input_embeddings().weight.device)
    with torch.no_grad(), evaluating(model), steering(model, 0.0), keeping:
        states = decoder(input_ids=ids, use_cache=False)[0]
    for module, output in reversed(outputs):
        if isinstance(output, Tensor) and output.shape == states.shape and torch.equal(output, states):
            return None if any(True for _ in module.children()) else module
    raise UnsupportedOperationError(
        f"Found no module in {type(base).__name__} that outputs its last hidden states: promoted tokens need the "
        "final norm."
    )
