"""One adapter of a model, as a folder that is there as a whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from ..errors import ConfigError


def is_taken(folder: Path) -> bool:
    """Whether there is something at the place of a new folder, other than an empty one."""
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def save_adapter(model: Any, folder: str | Path, adapter_name: str = "default") -> Path:
    """Saves one adapter of a `PeftModel` into a folder of its own, whatever it is called in the model.

    Args:
        model: The model.
        folder: Where to; one that is there, and has something in it, is left alone.
        adapter_name: Which adapter.

    Returns:
        The folder.

    Raises:
        ConfigError: The folder is there already, or there is no such adapter.
    """
    folder = Path(folder)
    if is_taken(folder):
        raise ConfigError(f"{str(folder)!r} is there already: give another name.")
    if adapter_name not in model.peft_config:
        raise ConfigError(f"adapter_name={adapter_name!r}: there is {', '.join(map(repr, model.peft_config))}.")
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    try:
        model.save_pretrained(str(partial), selected_adapters=[adapter_name])
        # PEFT saves all adapters but the one called "default" in a folder of their own.
        inner = partial / adapter_name
        (inner if inner.is_dir() else partial).rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder
