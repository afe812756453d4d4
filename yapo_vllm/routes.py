"""Routes of the OpenAI server that list, load and unload adapters.

vLLM adds them only if `VLLM_PLUGINS` names "yapo", and they load adapters from the folders in `YAPO_FOLDERS` only.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any, ClassVar

from fastapi import FastAPI, HTTPException  # pyright: ignore[reportMissingImports]
from pydantic import BaseModel, ConfigDict

from yapo_peft.errors import YaPOError

from .client import list_adapters, load_adapter_async, unload_adapter_async
from .settings import Settings


class _Named(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str


class _Sourced(_Named):
    path: str


class Routes:
    """vLLM's `EndpointPlugin`."""

    name: ClassVar[str] = "yapo"
    required_tasks: ClassVar[tuple[str, ...]] = ("generate",)

    def __init__(self) -> None:
        self._engine: Any = None

    def attach_router(self, app: FastAPI) -> None:
        """Adds the routes."""
        app.get("/v1/yapo_adapters")(self._list)
        app.post("/v1/load_yapo_adapter")(self._load)
        app.post("/v1/unload_yapo_adapter")(self._unload)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Keeps the server's engine."""
        self._engine = engine_client
        if (getattr(args, "api_server_count", None) or 1) > 1:
            raise YaPOError(
                "Adapters cannot be loaded at run time with --api-server-count above 1, because each server "
                "keeps its own list: start one, or name all adapters in YAPO_ADAPTERS and leave VLLM_PLUGINS unset."
            )

    async def _list(self) -> list[dict[str, Any]]:
        return [_public(adapter) for adapter in list_adapters(self._engine).values()]

    async def _load(self, body: _Sourced) -> dict[str, Any]:
        before = set(list_adapters(self._engine))
        try:
            adapter = await load_adapter_async(self._engine, body.name, Settings.of().allowed(body.path))
        except YaPOError as error:
            raise HTTPException(400, str(error)) from error
        return {**_public(adapter), "displaced": sorted(before - set(list_adapters(self._engine)))}

    async def _unload(self, body: _Named) -> dict[str, str]:
        try:
            await unload_adapter_async(self._engine, body.name)
        except YaPOError as error:
            raise HTTPException(404, str(error)) from error
        return {"unloaded": body.name}


def _public(adapter: Any) -> dict[str, Any]:
    shown = ("name", "source", "layers", "positions", "multiplier", "digest")
    return {name: getattr(adapter, name) for name in shown}
