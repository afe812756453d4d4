"""Loads models, adapters, tokenizers and pairs. Commands import this when they run, because it imports torch."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import AutoPeftModelForCausalLM, PeftConfig, get_peft_model
from peft.utils import infer_device
from transformers import AutoModelForCausalLM, AutoTokenizer

from yapo_peft import AdapterFileError, ConfigError, YaPOConfig, YaPOError
from yapo_peft.adapter_file.reading import SavedAdapter
from yapo_peft.data import load_pairs
from yapo_peft.tuner.adapters import adapter_of


def load_tokenizer(name: str) -> Any:
    """Loads the tokenizer of a model, or of an adapter's model. Raises `OSError` if there is none."""
    config = _adapter_config(name)
    if config is not None:
        try:
            # A trainer saves it with the adapter, including the chat template.
            return AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError):
            name = config.base_model_name_or_path or name
    return AutoTokenizer.from_pretrained(name)


def load_model(name: str, dtype: str = "auto") -> Any:
    """Loads a model, with its adapter if `name` is one, in eval mode on the available device.

    Args:
        name: Folder or Hub repository of a model or an adapter.
        dtype: dtype of the model, such as "bfloat16"; "auto" is as saved.

    Raises:
        AdapterFileError: The adapter is damaged.
        ConfigError: There is no such dtype.
        OSError: There is no such model or adapter.
    """
    named = getattr(torch, dtype, None)
    if dtype != "auto" and not (isinstance(named, torch.dtype) and named.is_floating_point):
        raise ConfigError(f"dtype={dtype!r}: must be 'auto' or a floating-point dtype of torch, such as 'bfloat16'.")
    config = _adapter_config(name)
    if isinstance(config, YaPOConfig):
        SavedAdapter(name)  # says what is wrong with a damaged one before the model is loaded
    loader = AutoModelForCausalLM if config is None else AutoPeftModelForCausalLM
    # Each process of `accelerate launch` has its own device.
    device = PartialState().device if "LOCAL_RANK" in os.environ else infer_device()
    model: Any = loader.from_pretrained(name, dtype=dtype)
    return model.to(device).eval()


def load_adapter(name: str, dtype: str = "auto") -> Any:
    """As `load_model`. Raises `ConfigError` unless `name` is a YaPO adapter."""
    if not isinstance(_adapter_config(name), YaPOConfig):
        raise ConfigError(f"{name!r} is not a YaPO adapter: pass an adapter.")
    return load_model(name, dtype)


def attach_adapter(name: str, dtype: str, **config: Any) -> Any:
    """Loads a model and adds a new adapter, which has no effect yet. Raises `ConfigError` as `YaPOConfig` does."""
    return get_peft_model(load_model(name, dtype), YaPOConfig(**config))


def require_effect(model: Any, adapter_name: str = "default") -> None:
    """Raises `ConfigError` if all entries of an adapter's codes are zero."""
    if not any(bool(layer.code(adapter_name).any()) for layer in adapter_of(model, adapter_name)[2]):
        raise ConfigError("All entries of the adapter are zero, so it would have no effect.")


def read_pairs(
    source: str, tokenizer: Any, prompt: str, chosen: str, rejected: str, split: str, limit: int | None
) -> Any:
    """Loads pairs, as messages if the tokenizer has a chat template, else as texts."""
    chat = bool(getattr(tokenizer, "chat_template", None))
    pairs = load_pairs(source, prompt=prompt, chosen=chosen, rejected=rejected, chat=chat, split=split)
    return first_rows(pairs, limit)


def first_rows(rows: Any, limit: int | None) -> Any:
    """The first rows of a dataset; all if `limit` is None."""
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


@cache
def _adapter_config(name: str) -> PeftConfig | None:
    """The config of an adapter; None if `name` is a model."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not any((folder / file).is_file() for file in ("adapter_config.json", "config.json")):
            inner = sorted(file.parent for file in folder.glob("*/adapter_config.json"))
            hint = f" {inner[0]} has an adapter." if inner else ""
            raise ConfigError(f"The folder {name!r} has neither an adapter nor a model.{hint}")
    elif name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ConfigError(f"There is no folder {name!r}.")
    try:
        return PeftConfig.from_pretrained(name)
    except YaPOError:
        raise
    except (ValueError, TypeError, KeyError, RecursionError) as error:  # the first also if there is no adapter
        if (Path(name) / "adapter_config.json").is_file():
            raise AdapterFileError(f"{name}/adapter_config.json cannot be read: {error}") from error
        return None
