"""YaPO steering in vLLM: an out-of-tree plugin that serves steering adapters exactly, per request.

vLLM finds it by its entry point and imports it in each of its processes, so vLLM and `yapo_peft` are imported only
when they are needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client import list_adapters, load_adapter, load_adapter_async, unload_adapter, unload_adapter_async
    from .served import Served

# The name of the extra argument under which requests ask for steering.
KEY = "yapo"

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

        return getattr(import_module(".served" if name == "Served" else ".client", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
