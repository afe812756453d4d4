"""Loads models, adapters and tokenizers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .options import whole_numbers


def load_tokenizer(name: str) -> Any:
    """Loads the tokenizer of a model, or of an adapter's model. Raises `OSError` if there is none."""
    from transformers import AutoTokenizer

    base = _base_of(name)
    if base is not None:
        try:
            # A trainer saves it with the adapter, including the chat template.
            return AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError):
            pass
    return AutoTokenizer.from_pretrained(base or name)


def load_model(name: str, dtype: str = "auto") -> Any:
    """Loads a model, with its adapter if `name` is one, in eval mode on the available device.

    Args:
        name: Folder or Hub repository of a model or an adapter.
        dtype: dtype of the model, such as "bfloat16"; "auto" is as saved.

    Raises:
        ConfigError: There is no such dtype.
        OSError: There is no such model or adapter.
    """
    import torch
    from accelerate import PartialState
    from peft import AutoPeftModelForCausalLM
    from peft.utils import infer_device
    from transformers import AutoModelForCausalLM

    from yapo_peft import ConfigError

    named = getattr(torch, dtype, None)
    if dtype != "auto" and not (isinstance(named, torch.dtype) and named.is_floating_point):
        raise ConfigError(f"dtype={dtype!r}: must be 'auto' or a floating-point dtype of torch, such as 'bfloat16'.")
    loader = AutoModelForCausalLM if _base_of(name) is None else AutoPeftModelForCausalLM
    # Each process of `accelerate launch` has its own device.
    device = PartialState().device if "LOCAL_RANK" in os.environ else infer_device()
    model: Any = loader.from_pretrained(name, dtype=dtype)
    return model.to(device).eval()


def load_adapter(name: str, dtype: str = "auto") -> Any:
    """As `load_model`. Raises `ConfigError` unless `name` is a YaPO adapter."""
    from yapo_peft import ConfigError, YaPOConfig

    model = load_model(name, dtype)
    if not any(isinstance(config, YaPOConfig) for config in getattr(model, "peft_config", {}).values()):
        raise ConfigError(f"{name!r} is not a YaPO adapter: pass an adapter.")
    return model


def _base_of(name: str) -> str | None:
    """The base model of an adapter; None if `name` is a model."""
    from peft import PeftConfig

    import yapo_peft  # registers the method

    _require_place(name)
    try:
        return PeftConfig.from_pretrained(name).base_model_name_or_path
    except yapo_peft.YaPOError:
        raise
    except ValueError as error:  # PEFT raises it if there is no adapter
        if (Path(name) / "adapter_config.json").is_file():
            raise yapo_peft.AdapterFileError(f"{name}/adapter_config.json cannot be read: {error}") from error
        return None


def _require_place(name: str) -> None:
    """Raises `ConfigError` for a local path without a model or an adapter."""
    from yapo_peft import ConfigError

    folder = Path(name).expanduser()
    if folder.is_dir():
        if not any((folder / file).is_file() for file in ("adapter_config.json", "config.json")):
            inner = sorted(file.parent for file in folder.glob("*/adapter_config.json"))
            hint = f" {inner[0]} has an adapter." if inner else ""
            raise ConfigError(f"The folder {name!r} has neither an adapter nor a model.{hint}")
    elif name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ConfigError(f"There is no folder {name!r}.")


def attach_adapter(
    name: str,
    dtype: str,
    *,
    space: str,
    layers: str,
    sae_release: str | None = None,
    sae_id: Sequence[str] | None = None,
    sae_path: Sequence[str] | None = None,
    positions: str = "all",
) -> Any:
    """Loads a model and adds a new adapter, which has no effect yet.

    Raises:
        ConfigError: There is not one SAE per layer, or a dense adapter has SAEs.
    """
    from peft import get_peft_model

    from yapo_peft import YaPOConfig

    config = YaPOConfig(
        layers=whole_numbers(layers, "--layers"),
        space=space,  # pyright: ignore[reportArgumentType]
        sae_release=sae_release,
        sae_id=list(sae_id) if sae_id else None,
        sae_path=list(sae_path) if sae_path else None,
        positions=positions,
    )
    return get_peft_model(load_model(name, dtype), config)


def require_effect(model: Any, adapter_name: str = "default") -> None:
    """Raises `ConfigError` if all entries of an adapter's codes are zero."""
    from yapo_peft import ConfigError
    from yapo_peft.tuner.adapters import adapter_of

    if not any(bool(layer.code(adapter_name).any()) for layer in adapter_of(model, adapter_name)[2]):
        raise ConfigError("All entries of the adapter are zero, so it would have no effect.")


def require_new(folder: Path) -> None:
    """Raises `ConfigError` before any work if an adapter could not be saved to a folder."""
    from yapo_peft import ConfigError
    from yapo_peft.adapter_file.saving import is_taken

    if is_taken(folder):
        raise ConfigError(f"--out {folder} is not empty: pass another folder.")
