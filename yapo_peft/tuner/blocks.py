"""Finds the model that PEFT wraps, and the layers of its decoder, whatever its architecture calls them."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from ..errors import ConfigError


def base_of(model: nn.Module) -> Any:
    """Returns the causal language model that PEFT wraps."""
    return cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Finds the decoder layers of a transformers model.

    Returns:
        The name of their list in the model, such as "model.layers", and the list.

    Raises:
        ConfigError: The model has no config, or no list of `num_hidden_layers` modules.
    """
    config = _text_config(model)
    depth = getattr(config, "num_hidden_layers", None)
    get_decoder: Any = getattr(model, "get_decoder", None)
    decoder = get_decoder() if get_decoder is not None else model
    names = {id(module): name for name, module in model.named_modules()}
    if depth is not None and isinstance(decoder, nn.Module):
        for module in decoder.modules():
            if isinstance(module, nn.ModuleList) and len(module) == depth and id(module) in names:
                return names[id(module)], module
    raise ConfigError(
        f"Found no decoder layers in {type(model).__name__}: steering needs a transformers decoder whose config has "
        "`num_hidden_layers`, with its layers in one nn.ModuleList of that length."
    )


def resolve_layers(layers: list[int], depth: int) -> list[int]:
    """Resolves negative layer indices, which count from the end.

    Raises:
        ConfigError: An index is out of range, or two name the same layer.
    """
    outside = [index for index in layers if not -depth <= index < depth]
    if outside:
        raise ConfigError(
            f"layers={layers} names layer {outside[0]}, but the model has {depth} layers: use 0 to {depth - 1}, or "
            f"-{depth} to -1 counted from the end."
        )
    resolved = [index % depth for index in layers]
    if len(set(resolved)) < len(resolved):
        raise ConfigError(f"layers={layers} names a layer twice: in a model of {depth} layers they are {resolved}.")
    return resolved


def hidden_size(model: nn.Module) -> int:
    """Width of the residual stream."""
    return int(_text_config(model).hidden_size)


def hidden_states(output: Tensor | tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    """Returns the hidden states of a layer's output, which is a tensor, or a tuple that starts with it."""
    return output if isinstance(output, Tensor) else output[0]


def with_hidden_states(
    output: Tensor | tuple[Tensor, ...] | list[Tensor], hidden: Tensor
) -> Tensor | tuple[Tensor, ...]:
    """Replaces the hidden states of a layer's output."""
    return hidden if isinstance(output, Tensor) else (hidden, *output[1:])


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    if config is None:
        raise ConfigError(f"{type(model).__name__} has no config: steering needs a transformers model.")
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
