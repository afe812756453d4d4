"""YaPO steering inside vLLM: an out-of-tree plugin that serves steering adapters exactly, per request.

vLLM finds it by its entry point. Nothing of vLLM or of `yapo_peft` is imported before it is needed, because vLLM
imports plugins in each of its processes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters import Served
    from .client import list_adapters, load_adapter, load_adapter_async, unload_adapter, unload_adapter_async

__all__ = [
    "Served",
    "list_adapters",
    "load_adapter",
    "load_adapter_async",
    "unload_adapter",
    "unload_adapter_async",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from importlib import import_module

        return getattr(import_module(".adapters" if name == "Served" else ".client", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
