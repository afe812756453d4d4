"""What a steered model does with the arguments of its calls that say how to steer each row."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

from torch import nn

from ..errors import ConfigError, UnsupportedOperationError
from .adapters import steered_layers
from .call import Call
from .multiplier import mark_lowest


class SteeredCalls:
    """The tuner's part that runs around forward passes and `generate`."""

    model: nn.Module
    peft_config: dict[str, Any]
    training: bool

    def _call(self) -> Call | None:
        """The one of all steered layers of the model, also when another tuner attached the first of them."""
        layers = steered_layers(self.model)
        return layers[0].call if layers else None

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' `generate`; `multipliers=`, `(batch,)`, steers each prompt with a multiplier of its own."""
        call = self._call()
        multipliers = kwargs.pop("multipliers", None)
        if call is None:
            return cast(Any, self.model).generate(*args, **kwargs)
        with call.generating(_prompt_length(args, kwargs), self._repeats(args, kwargs), multipliers):
            return cast(Any, self.model).generate(*args, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', which packs prompts as they come: rows cannot be told apart there.

        Raises:
            UnsupportedOperationError: Rows are to be steered differently.
        """
        given = [name for name in ("multipliers", "adapter_names") if kwargs.get(name) is not None]
        if given:
            raise UnsupportedOperationError(
                f"{given[0]}= cannot be used in generate_batch, which packs prompts into one row: use generate."
            )
        return cast(Any, self.model).generate_batch(*args, **kwargs)

    def _repeats(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """How often `generate` repeats each row: what a call leaves open is as its config says, or else the model's."""
        given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
        configs = [config for config in (given, self.model.generation_config) if config is not None]
        return max(
            next((count for count in (kwargs.get(name), *(getattr(c, name, None) for c in configs)) if count), 1)
            for name in ("num_beams", "num_return_sequences")
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Generator[None]:
        """PEFT calls this around each forward and `generate`; it is where `adapter_names` gets its meaning."""
        adapter_names, call = kwargs.get("adapter_names"), self._call()
        if adapter_names is None or call is None:
            yield
            return
        if self.training:
            raise ConfigError("adapter_names= cannot be used in training mode: call model.eval() first.")
        unknown = sorted(set(adapter_names) - set(self.peft_config) - {"__base__"})
        if unknown:
            known = ", ".join(map(repr, [*self.peft_config, "__base__"]))
            raise ConfigError(f"adapter_names= names {unknown[0]!r}, but the model has {known}.")
        before, call.adapter_names = call.adapter_names, list(adapter_names)
        mark_lowest(self.model)
        try:
            yield
        finally:
            call.adapter_names = before
            mark_lowest(self.model)


def _prompt_length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    candidates = (kwargs.get("inputs_embeds"), args[0] if args else None, kwargs.get("inputs"), kwargs.get("input_ids"))
    # Without a prompt, `generate` starts from the BOS token.
    return next((int(inputs.shape[1]) for inputs in candidates if inputs is not None), 1)
