"""Finds the checkpoint that training resumes from, and checks that it is whole and of the same run."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn

from ..adapter_file.reading import require_whole
from ..errors import AdapterFileError, ConfigError
from ..tuner import YaPOConfig

# The last file of a checkpoint that transformers writes.
_STATE = "trainer_state.json"
_OPTIMIZER = ("optimizer.pt", "scheduler.pt")


def last_whole_checkpoint(output_dir: str, say: Callable[[str], None]) -> str | None:
    """Returns the last checkpoint of a run that is whole, or None if there is no checkpoint at all.

    Args:
        output_dir: The run's folder.
        say: Is told which ones are skipped, and why.

    Raises:
        AdapterFileError: There are checkpoints, and none is whole.
    """
    names = Path(output_dir).glob("checkpoint-*")
    found = {int(number): folder for folder in names if (number := folder.name.partition("-")[2]).isdecimal()}
    for _, folder in sorted(found.items(), reverse=True):
        reason = _why_incomplete(folder)
        if reason is None:
            return str(folder)
        say(f"Skipping {str(folder)!r}, which a killed process left incomplete: {reason}.")
    if found:
        raise AdapterFileError(f"No checkpoint in {output_dir!r} is whole: start again without resume_from_checkpoint.")
    return None


def require_resumable(model: nn.Module, folder: Path, has_optimizer: bool) -> None:
    """Raises unless training can go on from a checkpoint as if it had not stopped.

    Args:
        model: The model to train.
        folder: The checkpoint.
        has_optimizer: Whether transformers, and not DeepSpeed or FSDP, keeps the optimizer's state.

    Raises:
        AdapterFileError: A file is missing or truncated.
        ConfigError: There is no state of the optimizer, or an adapter has other `positions`.
    """
    reason = _why_incomplete(folder)
    if reason is not None:
        raise AdapterFileError(f"The checkpoint {str(folder)!r} is incomplete: {reason}. Resume from an earlier one.")
    missing = [name for name in _OPTIMIZER if has_optimizer and not (folder / name).is_file()]
    if missing:
        raise ConfigError(
            f"The checkpoint {str(folder)!r} has no {missing[0]} (save_only_model=True?), so going on from it would be "
            "another run. Resume from a whole one, or start a new run from this adapter: "
            f"PeftModel.from_pretrained(model, {str(folder)!r}, is_trainable=True)."
        )
    for name, config in cast(dict[str, Any], getattr(model, "peft_config", {})).items():
        place = folder if name == "default" else folder / name
        if not isinstance(config, YaPOConfig) or not (place / CONFIG_NAME).is_file():
            continue
        saved = cast(YaPOConfig, YaPOConfig.from_pretrained(str(place)))
        if saved.positions != config.positions:
            raise ConfigError(
                f"The checkpoint {str(folder)!r} was trained with positions={saved.positions!r}, and this run has "
                f"positions={config.positions!r}: use the same to resume from it."
            )


def _why_incomplete(folder: Path) -> str | None:
    """What is missing or truncated in a checkpoint; None if it is whole."""
    if not (folder / _STATE).is_file():
        return f"it has no {_STATE}"
    try:
        json.loads((folder / _STATE).read_text())
        for file in folder.glob(f"**/{SAFETENSORS_WEIGHTS_NAME}"):
            require_whole(file.parent)
    except AdapterFileError as error:
        return str(error).rstrip(".")
    except ValueError:
        return f"{_STATE} is truncated"
    saved = [file for pattern in (*_OPTIMIZER, "rng_state*.pth") for file in folder.glob(pattern)]
    cut = [file.name for file in saved if not zipfile.is_zipfile(file)]
    return f"{cut[0]} is truncated" if cut else None
