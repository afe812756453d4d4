"""Loads models, adapters, tokenizers and pairs. Commands import this when they run, because it imports torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

import torch
import transformers
from accelerate import PartialState
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import infer_device
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from yapo_peft import ConfigError, YaPOConfig, YaPOError
from yapo_peft.adapter_file.reading import SavedAdapter
from yapo_peft.sae import FrozenSAE
from yapo_peft.tuner.adapters import adapter_of
from yapo_peft.tuner.attaching import adapter_name_of

from .lookup import adapter_config, is_adapter, require_adapter

Found = TypeVar("Found")


def load_tokenizer(name: str, base: str | None = None) -> Any:
    """Loads the tokenizer of a model, or of an adapter's model, at `base` if given. Raises `OSError` if it has none."""
    config = adapter_config(name)
    own = None if config is None else _own_tokenizer(name)
    if own is not None:
        return own
    source, _ = _base_of(name, config, base)
    with _naming_the_option(name, config, base):
        return AutoTokenizer.from_pretrained(source)


@lru_cache(maxsize=4)  # those of many checkpoints would fill the memory
def _own_tokenizer(adapter: str) -> Any:
    """The tokenizer that a trainer saved with an adapter, with its chat template; None if there is none."""
    try:
        return AutoTokenizer.from_pretrained(adapter)
    except (OSError, ValueError):
        return None


def load_model(
    name: str, dtype: str = "auto", base: str | None = None, device: str | None = None, named: bool = False
) -> Any:
    """Loads a model, with its adapter if `name` is one, in eval mode.

    Args:
        name: Folder or Hub repository of a model or an adapter.
        dtype: dtype of the model, such as "bfloat16"; "auto" is as saved.
        base: Folder or Hub repository of an adapter's model; None for where its config says.
        device: Where it goes, such as "cuda:1"; None for the fastest available device.
        named: Whether the adapter is called as its folder is, instead of "default".

    Raises:
        AdapterFileError: The adapter is damaged.
        ConfigError: There is no such dtype or device, or an adapter's model is not where its config says.
        OSError: There is no such model or adapter.
    """
    config = adapter_config(name)
    if isinstance(config, YaPOConfig):
        SavedAdapter(name)  # says what is wrong with a damaged one before the model is loaded
    model = _load_base(name, dtype, base)
    return _placed(model if config is None else _attached(model, name, named), device)


def _placed(model: Any, device: str | None = None) -> Any:
    if device is None:
        # Each process of `accelerate launch` has its own device.
        return model.to(PartialState().device if "LOCAL_RANK" in os.environ else infer_device()).eval()
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {device}: {error}") from error


def _load_base(name: str, dtype: str, base: str | None) -> Any:
    """Loads a model, or that of an adapter without the adapter. Raises as `load_model`."""
    named = getattr(torch, dtype, None)
    if dtype != "auto" and not (isinstance(named, torch.dtype) and named.is_floating_point and named.itemsize > 1):
        raise ConfigError(f"dtype={dtype!r}: must be 'auto' or a floating-point dtype of torch, such as 'bfloat16'.")
    config = adapter_config(name)
    source, revision = _base_of(name, config, base)
    with _naming_the_option(name, config, base):
        return _class_of(source, revision).from_pretrained(source, dtype=dtype, revision=revision)


def _attached(model: Any, name: str, named: bool = False) -> Any:
    tokens = len(_own_tokenizer(name) or ())
    if tokens > _vocabulary(model):  # as PEFT's auto classes do
        model.resize_token_embeddings(tokens)
    return PeftModel.from_pretrained(model, name, adapter_name_of(name, model) if named else "default")


def _vocabulary(model: Any) -> int:
    return model.get_input_embeddings().weight.shape[0]


def _has_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def _base_of(name: str, config: PeftConfig | None, base: str | None) -> tuple[str, str | None]:
    """Where a model is, or the model of an adapter, and its revision."""
    if config is None:
        return name, None
    source = base or config.base_model_name_or_path
    if not source:
        raise ConfigError(f"The adapter {name!r} does not say which model it is for: pass it with --model.")
    return source, None if base else config.revision


@contextmanager
def _naming_the_option(name: str, config: PeftConfig | None, base: str | None) -> Generator[None]:
    """Says what cannot be loaded, and what to do if an adapter's model is not where its config says."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, YaPOError):
            raise
        if config is not None and base is None:
            raise ConfigError(
                f"The model {config.base_model_name_or_path!r} of {name!r} cannot be loaded: pass where it is with "
                f"--model. ({error})"
            ) from error
        if isinstance(error, OSError):
            raise
        raise ConfigError(f"{base or name!r} cannot be loaded: {error}") from error


def _class_of(name: str, revision: str | None) -> Any:
    """The class to load a model with: that of its config, if `AutoModelForCausalLM` has none for it."""
    config = AutoConfig.from_pretrained(name, revision=revision)
    own = getattr(transformers, (config.architectures or [""])[0], None)
    return AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or own is None else own


def load_adapter(name: str, dtype: str = "auto", base: str | None = None, named: bool = False) -> Any:
    """As `load_model`. Raises `ConfigError` unless `name` is a YaPO adapter."""
    require_adapter(name)
    return load_model(name, dtype, base, named=named)


def load_together(adapters: list[str], dtype: str = "auto", base: str | None = None) -> tuple[Any, list[str]]:
    """Loads a model with several adapters, as `load_adapter`, and returns it with their names in it."""
    first, *others = adapters
    for source in others:
        SavedAdapter(source)  # says what is wrong with it before the model is loaded
    model = load_adapter(first, dtype, base)
    # PEFT does not take dots in the name of an adapter.
    names = ["default", *(f"{place}: {source}".replace(".", "_") for place, source in enumerate(others, 2))]
    for name, source in zip(names[1:], others, strict=True):
        model.load_adapter(source, name)
    return model, names


def with_each_adapter(
    names: list[str],
    read: Callable[[Any], Any],
    measure: Callable[[str, Any, Any, Any], Found],
    dtype: str = "auto",
    base: str | None = None,
    *,
    any_method: bool = False,
) -> list[Found]:
    """Loads adapters one after another, and measures each. Those of one model, in a row, share it.

    Args:
        names: Folders or Hub repositories.
        read: Loads the dataset, given a tokenizer. It depends only on whether that has a chat template.
        measure: Measures an adapter, given its name, its model, its tokenizer and the dataset.
        dtype: As for `load_model`.
        base: As for `load_model`.
        any_method: Whether adapters of other methods are accepted.

    Raises:
        ConfigError: One is not an adapter, or as `load_model`; before a model is loaded.
    """
    datasets: dict[bool, Any] = {}
    for name in names:
        require_adapter(name, any_method)
        if is_adapter(name):
            SavedAdapter(name)  # says what is wrong with a damaged one
        tokenizer = load_tokenizer(name, base)
        if _has_template(tokenizer) not in datasets:
            datasets[_has_template(tokenizer)] = read(tokenizer)
    found: list[Found] = []
    model, of = None, None
    for name in names:
        source = _base_of(name, adapter_config(name), base)
        if source != of:
            model = None  # before another takes its memory
        model = _load_base(name, dtype, base) if model is None else model
        size, of = _vocabulary(model), source
        tokenizer, steered = load_tokenizer(name, base), _placed(_attached(model, name))
        found.append(measure(name, steered, tokenizer, datasets[_has_template(tokenizer)]))
        # Other methods may not leave a model as it was.
        is_clean = is_adapter(name) and not adapter_config(name).modules_to_save  # pyright: ignore
        model = steered.unload() if is_clean and _vocabulary(model) == size else None
        del steered
    return found


def attach_adapter(name: str, dtype: str, adapter_name: str = "default", **config: Any) -> Any:
    """Loads a model and adds a new adapter, which has no effect yet. Raises `ConfigError` as `YaPOConfig` does."""
    if adapter_config(name) is not None:
        raise ConfigError(f"{name!r} is an adapter: pass a model.")
    made = YaPOConfig(**config)
    _saes = load_saes(name, made)  # kept until the model is loaded, too
    return get_peft_model(load_model(name, dtype), made, adapter_name)


def load_saes(name: str, config: YaPOConfig) -> list[FrozenSAE]:
    """Loads the SAEs of a new adapter. Raises `ConfigError` if the model's config says that it lacks a layer."""
    with _naming_the_option(name, None, None):
        count: int | None = getattr(AutoConfig.from_pretrained(name).get_text_config(), "num_hidden_layers", None)
    layers = config.layer_indices()
    for layer in layers:
        if count is not None and not -count <= layer < count:
            raise ConfigError(f"layers={layer}: {name} has layers 0 to {count - 1}.")
    return [config.load_sae(place) for place in range(len(layers) if config.space == "sae" else 0)]


def has_effect(model: Any, adapter_name: str = "default") -> bool:
    """Whether an entry of an adapter's codes is not zero."""
    return any(bool(layer.code(adapter_name).any()) for layer in adapter_of(model, adapter_name)[2])


def require_effect(model: Any, adapter_name: str = "default") -> None:
    """Raises `ConfigError` if all entries of an adapter's codes are zero."""
    if not has_effect(model, adapter_name):
        raise ConfigError("All entries of the adapter are zero, so it would have no effect.")
