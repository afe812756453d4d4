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
from ..tuner.blocks import base_of
from ..tuner.hooks import forward_hooks

# Maximum number of directions per call of the head, to limit memory.
_ROWS = 64


class Unembedding:
    """The final norm and the head of a causal language model, applied to directions of the residual stream.

    Each direction passes through the final norm as if it were the whole residual stream, and then through the head.
    The effects of the layers in between, and of the rest of the residual stream on the norm, are ignored.

    Args:
        model: A model with a YaPO adapter.

    Raises:
        UnsupportedOperationError: The model has no head, or no single module between its last layer and its head.

    Source: the logit lens.
    """

    def __init__(self, model: nn.Module) -> None:
        base = base_of(model)
        self._head: Any = base.get_output_embeddings()
        if self._head is None:
            raise UnsupportedOperationError(
                f"{type(base).__name__} has no output embeddings: promoted tokens need a causal language model."
            )
        self._norm: Any = _final_norm(model, base)

    @torch.no_grad()
    def logits(self, directions: Tensor) -> Tensor:
        """Returns the change of the logits by directions `(n, d_model)`, `(n, vocabulary)` in float32, centred."""
        parameter = next(self._head.parameters())
        found: list[Tensor] = []
        for part in directions.split(_ROWS):
            # Large enough that the norm's epsilon and a bias before it do not matter.
            part = nn.functional.normalize(part.float(), dim=-1) * 100 * part.shape[-1] ** 0.5
            part = part.to(parameter.device, parameter.dtype)
            zero = torch.zeros_like(part[:1])
            moved = self._norm(part) - self._norm(zero) if self._norm is not None else part
            logits = (self._head(moved) - self._head(zero)).float()
            found.append(logits - logits.mean(dim=-1, keepdim=True))
        return torch.cat(found)

    def tokens(
        self, directions: Tensor, tokenizer: PreTrainedTokenizerBase, count: int
    ) -> tuple[list[list[str]], list[list[str]]]:
        """Returns the texts of the tokens that each direction, `(n, d_model)`, raises and lowers the most."""
        vocabulary = min(len(tokenizer), self._head.weight.shape[0])
        promotes: list[list[str]] = []
        suppresses: list[list[str]] = []
        for part in directions.split(_ROWS):
            logits = self.logits(part)[:, :vocabulary]
            for chosen, texts in ((logits, promotes), (-logits, suppresses)):
                texts += [
                    [tokenizer.decode([i]) for i in row] for row in chosen.topk(min(count, vocabulary)).indices.tolist()
                ]
        return promotes, suppresses


def _final_norm(model: nn.Module, base: Any) -> nn.Module | None:
    """The module whose output is the decoder's, found by running one token; None if that is the last layer."""
    decoder, head = base.get_decoder(), base.get_output_embeddings()
    outputs: list[tuple[nn.Module, Any]] = []

    def keep(module: nn.Module, output: Any) -> None:
        outputs.append((module, output))

    candidates = [
        module
        for module in decoder.modules()
        if not isinstance(module, nn.ModuleList) and module is not decoder and module is not head
    ]
    keeping = forward_hooks((module, partial(keep, module)) for module in candidates)
    ids = torch.zeros(1, 1, dtype=torch.long, device=base.get_input_embeddings().weight.device)
    with torch.no_grad(), evaluating(model), steering(model, 0.0), keeping:
        states = decoder(input_ids=ids, use_cache=False)[0]
    if decoder is base:  # Llama 4 and others have no decoder of their own, and return logits
        states = next(output for _, output in reversed(outputs) if isinstance(output, Tensor))
    for module, output in reversed(outputs):
        if isinstance(output, Tensor) and output.shape == states.shape and torch.equal(output, states):
            return None if any(True for _ in module.children()) else module
    raise UnsupportedOperationError(
        f"The final norm of {type(base).__name__} was not found, because no module outputs its last hidden states: "
        "promoted tokens are not supported for it."
    )
