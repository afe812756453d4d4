"""Saves an adapter into a folder, completely or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from .._utils import partial_of
from ..errors import ConfigError


def save_adapter(model: Any, folder: str | Path, adapter_name: str = "default") -> Path:
    """Saves one adapter of a `PeftModel` directly into a folder, whatever the name of the adapter.

    Args:
        model: The model.
        folder: The folder, which must be new or empty.
        adapter_name: Which adapter.

    Returns:
        The folder.

    Raises:
        ConfigError: The folder is not empty, or the model has no such adapter.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{str(folder)!r} already exists: choose another name.")
    if adapter_name not in model.peft_config:
        raise ConfigError(f"adapter_name={adapter_name!r}: the model has {', '.join(map(repr, model.peft_config))}.")
    partial = partial_of(folder)
    try:
        model.save_pretrained(str(partial), selected_adapters=[adapter_name])
        # PEFT saves adapters in a subfolder, except for "default".
        inner = partial / adapter_name
        (inner if inner.is_dir() else partial).rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder
