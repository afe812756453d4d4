"""Loads and unloads adapters while an engine runs."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from yapo_peft.errors import ConfigError

from .frontend import Frontend
from .served import AdapterFile, Served


def list_adapters(engine: Any) -> dict[str, Served]:
    """Returns the adapters that an engine serves, by name.

    Args:
        engine: A `vllm.LLM`, an `LLMEngine` or an `AsyncLLM`.
    """
    return dict(_frontend(engine).adapters)


def load_adapter(engine: Any, name: str, source: str) -> Served:
    """Loads an adapter, replacing one of the same name.

    If all slots are taken, the least recently used adapter that no unfinished request needs is displaced. A Hub
    repository is downloaded before the engine is called.

    Args:
        engine: A `vllm.LLM`, or an `LLMEngine`.
        name: Its name in requests.
        source: Its folder, which the workers must see under the same path, or its Hub id.

    Raises:
        YaPOError: It cannot be read, does not fit the model, or all slots are in use.
    """
    return _update(engine, _call(engine, "yapo_load", name, _fetched(engine, source)))[name]


def unload_adapter(engine: Any, name: str) -> None:
    """Unloads an adapter; running requests that use it are finished with it.

    Raises:
        ConfigError: No adapter has this name.
    """
    _update(engine, _call(engine, "yapo_unload", name))


async def load_adapter_async(engine: Any, name: str, source: str) -> Served:
    """As `load_adapter`, for an `AsyncLLM`."""
    fetched = await asyncio.to_thread(_fetched, engine, source)
    return _update(engine, await _call_async(engine, "yapo_load", name, fetched))[name]


async def unload_adapter_async(engine: Any, name: str) -> None:
    """As `unload_adapter`, for an `AsyncLLM`."""
    _update(engine, await _call_async(engine, "yapo_unload", name))


def _fetched(engine: Any, source: str) -> str:
    """The adapter's local folder, read once in full so that the engine neither waits for downloads nor finds errors."""
    source = os.path.expanduser(source)  # noqa: PTH111 (also of Hub ids)
    file = AdapterFile(source)
    file.parts(getattr(engine, "llm_engine", engine).model_config.get_hidden_size())
    return str(Path(source).resolve()) if Path(source).is_dir() else file.folder_in_cache()


def _call(engine: Any, method: str, *args: str) -> Any:
    client = getattr(engine, "llm_engine", engine).engine_core
    try:
        if hasattr(client, "call_utility"):
            return client.call_utility(method, *args)
        return getattr(client.engine_core, method)(*args)  # in the same process
    except Exception as error:
        raise _as_ours(error) from error


async def _call_async(engine: Any, method: str, *args: str) -> Any:
    try:
        return await engine.engine_core.call_utility_async(method, *args)
    except Exception as error:
        raise _as_ours(error) from error


def _as_ours(error: Exception) -> ConfigError:
    """Errors of another process arrive as text, after the name of the method."""
    return error if isinstance(error, ConfigError) else ConfigError(str(error).rpartition(" method failed: ")[2])


def _update(engine: Any, served: list[dict[str, Any]]) -> dict[str, Served]:
    found = [Served.from_dict(fields) for fields in served]
    _frontend(engine).adapters = {adapter.name: adapter for adapter in found}
    return _frontend(engine).adapters


def _frontend(engine: Any) -> Frontend:
    return Frontend.of(getattr(engine, "llm_engine", engine).input_processor)
