"""Steering where requests are scheduled: adapters come and go while others are in use."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from yapo_peft.errors import ConfigError, UnsupportedOperationError

from .adapters import AdapterFile, Prepared, Served
from .request import scheduled_steering
from .settings import Settings, require_name

# vLLM shows what its own loggers say.
logger = logging.getLogger("vllm.yapo")


class EngineAdapters:
    """The adapters in the workers' slots.

    An adapter's number is never given again, so a request that has one gets that adapter or an error, whatever is
    loaded or unloaded meanwhile. A slot is given to another adapter only when no unfinished request needs it.

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
        """Those that requests can name."""
        return [self._by_number[number].to_dict() for _, number in sorted(self._names.items())]

    def load(self, name: str, source: str) -> list[dict[str, Any]]:
        """Serves an adapter, in the place of one of the same name, or of the one that was not asked for the longest.

        Returns:
            All that are served then.

        Raises:
            YaPOError: It cannot be read, does not fit, or all slots are in use.
        """
        if not self._settings.is_active:
            raise UnsupportedOperationError(
                "This server was not started to steer: start it with YAPO_ADAPTERS, or YAPO_LAYERS for the blocks that "
                "adapters loaded later will steer."
            )
        prepared = self._prepared
        adapter = AdapterFile(source).describe(
            self._next_number, 0, require_name(name), prepared.d_model, prepared.depth
        )
        prepared.require_room(adapter)
        slot = self._free_slot(name)
        adapter = replace(adapter, slot=slot)
        # All workers have it before one of them gives up what is in the slot.
        self._engine.collective_rpc("yapo_read", args=(adapter.to_dict(),))
        for number in [number for number, other in self._by_number.items() if other.slot == slot]:
            self._forget(number)
        self._engine.collective_rpc("yapo_place")
        self._add(adapter)
        return self.served()

    def unload(self, name: str) -> list[dict[str, Any]]:
        """Serves an adapter no longer. Requests that have it go on to their end.

        Returns:
            All that are served then.

        Raises:
            ConfigError: There is none of that name.
        """
        if name not in self._names:
            raise ConfigError(f"There is no adapter {name!r}. Served: {', '.join(map(repr, self._names)) or 'none'}.")
        del self._names[name]
        return self.served()

    def admits(self, request: Any) -> bool:
        """Whether the adapters of a request are still here; if not, it ends with an error.

        They are not if they were unloaded and displaced after the request was read and before it arrived.
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
        """A slot for an adapter of a name."""
        in_use = {number for request in self._engine.scheduler.requests.values() for number in _numbers(request)}
        taken = {adapter.slot for adapter in self._by_number.values()}
        empty = [slot for slot in range(self._settings.max_adapters) if slot not in taken]
        if empty:
            return empty[0]
        # First the ones that are served no longer, then the one that this replaces, then the least recently used.
        named = self._names.values()
        order = [*(number for number in self._by_number if number not in named), self._names.get(name), *named]
        for number in order:
            if number is not None and number not in in_use:
                adapter = self._by_number[number]
                if number in named and adapter.name != name:
                    logger.warning("Adapter %r makes room for %r.", adapter.name, name)
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
    """The adapters of a scheduled request."""
    return {number for number, _ in scheduled_steering(request)}
