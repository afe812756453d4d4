"""Loads and unloads adapters in the engine's process, which schedules the requests."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from yapo_peft.errors import ConfigError, UnsupportedOperationError

from .request import scheduled_steering
from .served import AdapterFile, Prepared, Served
from .settings import Settings, require_name

# vLLM shows what its own loggers say.
logger = logging.getLogger("vllm.yapo")


class EngineAdapters:
    """The adapters in the workers' slots.

    Ids are never reused, so that a request gets its adapter or an error, whatever is loaded or unloaded meanwhile. A
    slot is reused only once no unfinished request needs its adapter.

    Args:
        engine: vLLM's `EngineCore`, whose workers have loaded the first adapters.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._settings = Settings.of()
        self._by_number: dict[int, Served] = {}
        self._names: dict[str, int] = {}  # the least recently used first
        self._next_number = 1
        if self._settings.is_active:
            self._prepared = Prepared.of(self._settings, engine.vllm_config.model_config)
            for adapter in self._prepared.adapters:
                self._add(adapter)

    def served(self) -> list[dict[str, Any]]:
        """Returns the adapters that requests can name."""
        return [self._by_number[number].to_dict() for _, number in sorted(self._names.items())]

    def load(self, name: str, source: str) -> list[dict[str, Any]]:
        """Loads an adapter, replacing one of the same name, or the least recently used one if all slots are taken.

        Returns:
            All adapters served from then on.

        Raises:
            YaPOError: It cannot be read, does not fit the model, or all slots are in use.
        """
        if not self._settings.is_active:
            raise UnsupportedOperationError(
                "This server was not started to steer: start it with YAPO_ADAPTERS, or YAPO_LAYERS for the layers that "
                "adapters loaded later will steer."
            )
        prepared = self._prepared
        adapter = AdapterFile(source).describe(
            self._next_number, 0, require_name(name), prepared.d_model, prepared.depth
        )
        prepared.check_fits(adapter)
        slot = self._free_slot(name)
        adapter = replace(adapter, slot=slot)
        # All workers have read it before any of them overwrites the slot.
        self._engine.collective_rpc("yapo_read", args=(adapter.to_dict(),))
        for number in [number for number, other in self._by_number.items() if other.slot == slot]:
            self._forget(number)
        self._engine.collective_rpc("yapo_place")
        self._add(adapter)
        return self.served()

    def unload(self, name: str) -> list[dict[str, Any]]:
        """Unloads an adapter; running requests that use it are finished with it.

        Returns:
            All adapters served from then on.

        Raises:
            ConfigError: No adapter has this name.
        """
        if name not in self._names:
            raise ConfigError(f"There is no adapter {name!r}. Served: {', '.join(map(repr, self._names)) or 'none'}.")
        del self._names[name]
        return self.served()

    def admits(self, request: Any) -> bool:
        """Whether the adapters of a request are still loaded; if not, the request ends with an error.

        An adapter can be displaced between the frontend's reading of a request and its arrival here.
        """
        numbers = _numbers(request)
        if any(number not in self._by_number for number in numbers):
            logger.warning("Request %s asks for an adapter that has just been displaced.", request.request_id)
            if not hasattr(self._engine, "_send_error_outputs_to_client"):
                raise ConfigError("An adapter of this request was displaced before it arrived: send it again.")
            self._engine._send_error_outputs_to_client([request.request_id], request.client_index)
            return False
        for name in [name for name, number in self._names.items() if number in numbers]:
            self._names[name] = self._names.pop(name)
        return True

    def _free_slot(self, name: str) -> int:
        """Chooses the slot for a new adapter."""
        in_use = {number for request in self._engine.scheduler.requests.values() for number in _numbers(request)}
        taken = {adapter.slot for adapter in self._by_number.values()}
        empty = [slot for slot in range(self._settings.max_adapters) if slot not in taken]
        if empty:
            return empty[0]
        # First unloaded adapters, then the one of the same name, then the least recently used.
        named = self._names.values()
        order = [*(number for number in self._by_number if number not in named), self._names.get(name), *named]
        for number in order:
            if number is not None and number not in in_use:
                adapter = self._by_number[number]
                if number in named and adapter.name != name:
                    logger.warning("Adapter %r is displaced by %r.", adapter.name, name)
                return adapter.slot
        raise UnsupportedOperationError(
            f"All {self._settings.max_adapters} adapters are in use by unfinished requests: load {name!r} later, or "
            "start the server with a larger YAPO_MAX_ADAPTERS."
        )

    def _add(self, adapter: Served) -> None:
        self._by_number[adapter.id] = adapter
        self._names.pop(adapter.name, None)
        self._names[adapter.name] = adapter.id
        self._next_number = max(self._next_number, adapter.id + 1)

    def _forget(self, number: int) -> None:
        adapter = self._by_number.pop(number)
        if self._names.get(adapter.name) == number:
            del self._names[adapter.name]


def _numbers(request: Any) -> set[int]:
    """The adapter ids of a scheduled request."""
    return {number for number, _ in scheduled_steering(request)}
