"""Small helpers that several packages share: configs, checks of arguments, files, modes, seeds and hashes."""

from __future__ import annotations

import glob
import hashlib
import inspect
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from numbers import Integral, Real
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .errors import ConfigError, UnsupportedOperationError

Config = TypeVar("Config")


def help_from_docstring(cls: type[Config]) -> type[Config]:
    """Gives the fields of a dataclass their `help` from its docstring's `Attributes:`, for command-line parsers."""
    section = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    texts = dict(re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE))
    for name, field in vars(cls)["__dataclass_fields__"].items():
        # Inherited fields belong to the parent too.
        if name in cls.__annotations__ and name in texts:
            field.metadata = MappingProxyType({**field.metadata, "help": " ".join(texts[name].split())})
    return cls


_LARGEST = torch.finfo(torch.float32).max
# Seconds after which a partial file is taken for the leftover of a process that was killed.
_STALE = 24 * 3600
# The size up to which `hash_model` always reads a tensor whole, and what it samples of larger ones, in entries.
_WHOLE, _START = 1 << 20, 1 << 12


def choice(options: Collection[object], **values: object) -> None:
    """Raises `ConfigError` unless each value is one of the options."""
    for name, value in values.items():
        if value not in options:
            listed = ", ".join(repr(option) for option in options if option is not None)
            raise ConfigError(f"{name}={value!r}: must be one of {listed}.")


def at_least(minimum: int, **values: object) -> None:
    """Raises `ConfigError` unless each value is a whole number that is large enough."""
    for name, value in values.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < minimum:
            raise ConfigError(f"{name}={value!r}: must be a whole number, at least {minimum}.")


def finite(**values: object) -> None:
    """Raises `ConfigError` unless each value is a number that is finite in float32."""
    for name, value in values.items():
        if not is_finite(value):
            raise ConfigError(f"{name}={value!r}: must be a finite number, such as 1.0 or -0.5.")


def as_rows(multipliers: Tensor | Sequence[float] | float | None) -> Tensor | None:
    """Converts multipliers to a tensor: one per row, `(batch,)`, or one for all rows, `()`.

    Raises:
        ConfigError: The multipliers are not finite numbers in float32.
    """
    if multipliers is None:
        return None
    message = f"multipliers={multipliers!r}: give one finite number per row of the batch, (batch,), or one for all."
    try:
        rows = torch.as_tensor(multipliers)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ConfigError(message) from error
    if rows.dim() > 1 or rows.dtype == torch.bool or rows.is_complex() or not rows.float().isfinite().all():
        raise ConfigError(message)
    return rows


def is_finite(value: object) -> bool:
    """Whether a value is a number that is finite in float32."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and abs(float(value)) <= _LARGEST
    except OverflowError:  # a whole number
        return False


@contextmanager
def replacing(file: Path) -> Generator[Path]:
    """Yields a temporary path beside a file, which replaces the file if the block raises nothing.

    The content is on the disk before it gets the file's name, so that a crash of the machine leaves the old or the new.
    """
    partial = partial_of(file)
    try:
        yield partial
        with partial.open("rb+") as written:
            os.fsync(written.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def partial_of(path: Path) -> Path:
    """A temporary path beside a file or a folder that is to be written; removes what killed processes left there."""
    remove_leftovers(path.parent, f"{glob.escape(path.name)}.*.partial")
    return path.with_name(f"{path.name}.{os.getpid()}.partial")


def remove_leftovers(folder: Path, pattern: str = "*.partial") -> None:
    """Removes what killed processes left: partial files and folders that nobody has written to for a day."""
    for partial in folder.glob(pattern):
        with suppress(OSError):  # another process was faster
            if partial.stat().st_mtime < time.time() - _STALE:
                shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


def begin_or_resume(file: Path, arguments: dict[str, Any]) -> None:
    """Records the arguments of a run, or checks that they are those of the run to resume.

    Raises:
        ConfigError: They differ, or cannot be saved as JSON.
    """
    try:
        text = json.dumps(arguments)
    except TypeError as error:
        raise ConfigError(f"An argument cannot be saved as JSON to resume later ({error}).") from error
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as partial:
            partial.write_text(text + "\n", encoding="utf-8")
        return
    begun, now = json.loads(file.read_text(encoding="utf-8")), json.loads(text)
    differing = [
        f"{name}: {begun.get(name)!r} before, {now.get(name)!r} now"
        for name in sorted({*begun, *now})
        if begun.get(name) != now.get(name)
    ]
    if differing:
        raise ConfigError(
            f"{str(file.parent)!r} has results of another run ({'; '.join(differing)}): pass another folder, or delete "
            "this one."
        )


def listed(value: Any) -> list[Any]:
    """A value as a list: none for None, one for a single value."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first parameter that is in memory; the CPU if none is."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Puts a model into evaluation mode for a while, and then each module back into the mode that it was in.

    Modes differ between modules: a fresh `PeftModel` is in training mode around a base model that is not.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def mixed_seed(*key: object) -> int:
    """A seed that depends on a key alone, so that it does not matter what was drawn before."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "little")


def whole(code: Tensor) -> Tensor:
    """Gathers a code, `(d_sae,)`, that FSDP2 or ZeRO-3 may have sharded; all processes must call this."""
    if isinstance(code, DTensor):
        return code.full_tensor().detach()
    if hasattr(code, "ds_id"):
        import deepspeed  # pyright: ignore[reportMissingImports]

        with deepspeed.zero.GatheredParameters([code]):
            return code.detach().clone()
    return code.detach()


def hash_tensors(head: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over a text and the names, shapes, dtypes and contents of tensors, in hexadecimal."""
    digest = hashlib.sha256(head.encode())
    for name, tensor in tensors:
        digest.update(f"|{name}{tuple(tensor.shape)}{tensor.dtype}|".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_model(
    model: Any, *, ignore: Callable[[str], bool] = lambda name: False, sampled: bool = False, head: str = ""
) -> str:
    """SHA-256 over what decides a model's outputs: config, weights, and the state of its adapters.

    Args:
        model: A transformers model, with or without adapters.
        ignore: Whether to leave out a module or a tensor, by its name.
        sampled: Whether to read only the start of large tensors, to save time. Codes are read whole.
        head: What else to hash.

    Raises:
        UnsupportedOperationError: A weight is offloaded.
    """
    config = json.loads(model.config.to_json_string(use_diff=False))
    for name in ("_name_or_path", "transformers_version", "use_cache"):
        config.pop(name, None)
    state = [head, type(model).__name__, json.dumps(config, sort_keys=True)]
    for name, module in model.named_modules():
        # Another method's scaling and this one's multipliers are not in any tensor.
        if isinstance(module, BaseTunerLayer) and not ignore(name):
            own = (module.active_adapters, module.disable_adapters, module.merged_adapters)
            more = (getattr(module, key, None) for key in ("scaling", "multiplier", "positions"))
            state.append(repr((name, *own, *more)))
    tensors = [(name, value) for name, value in sorted(model.state_dict().items()) if isinstance(value, Tensor)]
    offloaded = [name for name, tensor in tensors if tensor.is_meta]
    if offloaded:
        raise UnsupportedOperationError(
            f"The model cannot be told from others, because {offloaded[0]!r} is offloaded: load it without offloading."
        )
    start = _START if sampled else None
    parts = (
        (name, tensor if tensor.numel() <= _WHOLE else tensor.flatten()[:start])
        for name, tensor in tensors
        if not ignore(name)
    )
    return hash_tensors("|".join(state), parts)
