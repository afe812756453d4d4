"""Loading and unloading adapters while an engine runs."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from yapo_peft.errors import ConfigError

from .adapters import AdapterFile, Served
from .frontend import Frontend
from .plugin import frontend_of


def list_adapters(engine: Any) -> dict[str, Served]:
    """The adapters that an engine serves, by name.

    Args:
        engine: A `vllm.LLM`, or an engine that it stands on.
    """
    return dict(_frontend(engine).adapters)


def load_adapter(engine: Any, name: str, source: str) -> Served:
    """Serves an adapter from now on, in the place of one of the same name.

    If all slots are taken, the adapter that was not asked for the longest makes room, unless unfinished requests need
    it. A repository of the Hub is fetched here, before the engine hears of it.

    Args:
        engine: A `vllm.LLM`, or an `LLMEngine`.
        name: What requests call it.
        source: Its folder, as the workers see it, or Hub id.

    Raises:
        YaPOError: It cannot be read, does not fit, or all slots are in use.
    """
    return _took(engine, _call(engine, "yapo_load", name, _fetched(engine, source)))[name]


def unload_adapter(engine: Any, name: str) -> None:
    """Serves an adapter no longer; requests that have it go on to their end.

    Raises:
        ConfigError: There is none of that name.
    """
    _took(engine, _call(engine, "yapo_unload", name))


async def load_adapter_async(engine: Any, name: str, source: str) -> Served:
    """As `load_adapter`, for an `AsyncLLM`."""
    fetched = await asyncio.to_thread(_fetched, engine, source)
    return _took(engine, await _call_async(engine, "yapo_load", name, fetched))[name]


async def unload_adapter_async(engine: Any, name: str) -> None:
    """As `unload_adapter`, for an `AsyncLLM`."""
    _took(engine, await _call_async(engine, "yapo_unload", name))


def _fetched(engine: Any, source: str) -> str:
    """The adapter's folder, once all of it can be read: the engine shall not wait for a network, nor find a mistake."""
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
    """Errors of another process come as text, behind the name of what was called."""
    return error if isinstance(error, ConfigError) else ConfigError(str(error).rpartition(" method failed: ")[2])


def _took(engine: Any, served: list[dict[str, Any]]) -> dict[str, Served]:
    found = [Served.from_dict(fields) for fields in served]
    _frontend(engine).adapters = {adapter.name: adapter for adapter in found}
    return _frontend(engine).adapters


def _frontend(engine: Any) -> Frontend:
    return frontend_of(getattr(engine, "llm_engine", engine).input_processor)
