"""Finds the model that PEFT wraps, and the layers of its decoder, whatever its architecture calls them."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from ..errors import ConfigError

# The name of the module in a layer that steers it.
CHILD_NAME = "yapo"


def is_code(name: str) -> bool:
    """Whether the name of a tensor in a model is that of a code."""
    return f".{CHILD_NAME}.yapo_code." in name


def is_steering(name: str) -> bool:
    """Whether a name in a model is that of a `YaPOLayer` or of something in one."""
    return f".{CHILD_NAME}." in f"{name}."


def base_of(model: nn.Module) -> Any:
    """Returns the causal language model that PEFT wraps."""
    return cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model


def decoder_blocks(model: nn.Module, named: str | None = None) -> tuple[str, nn.ModuleList]:
    """Finds the decoder layers of a transformers model.

    Args:
        model: The model.
        named: The name of their list in the model; None for that of its steered layers, or the one that fits its
            config.

    Returns:
        The name of their list in the model, such as "model.layers", and the list.

    Raises:
        ConfigError: There is no such list, or the model has no config.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if named is not None:
        if named not in lists:
            raise ConfigError(f"blocks={named!r}: {_name_one_of(model, lists)}")
        return named, lists[named]
    for name, blocks in lists.items():
        if any(hasattr(block, CHILD_NAME) for block in blocks):
            return name, blocks
    config = _text_config(model)
    depth = getattr(config, "num_hidden_layers", None)
    get_decoder: Any = getattr(model, "get_decoder", None)
    decoder = get_decoder() if get_decoder is not None else model
    within = {id(module) for module in decoder.modules()} if isinstance(decoder, nn.Module) else set()
    for name, blocks in lists.items():
        if len(blocks) == depth and id(blocks) in within:
            return name, blocks
    raise ConfigError(
        f"Found no decoder layers in {type(model).__name__}, whose config would give their number as "
        f"num_hidden_layers: {_name_one_of(model, lists)}"
    )


def _name_one_of(model: nn.Module, lists: dict[str, nn.ModuleList]) -> str:
    found = ", ".join(f"{name!r} ({len(blocks)} modules)" for name, blocks in lists.items())
    if not found:
        return f"{type(model).__name__} has no nn.ModuleList that could hold them, so it cannot be steered."
    return f"name the list of its layers with YaPOConfig(blocks=...), one of {found}."


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
    width = getattr(_text_config(model), "hidden_size", None)
    # Configs that say it by another name do not say it of the embeddings.
    return int(cast(Any, model).get_input_embeddings().weight.shape[1] if width is None else width)


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
