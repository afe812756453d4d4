"""vLLM's entry point: wraps the few methods of vLLM that steering needs. Without steering, they behave as before."""

from __future__ import annotations

import functools
import os
import sys
import weakref
from collections.abc import Callable
from typing import Any

from . import KEY

_MARK = "_yapo"
# The OpenAI server's request types that can steer, by their modules in vLLM.
_HTTP = {
    "chat_completion": "ChatCompletionRequest",
    "completion": "CompletionRequest",
    "responses": "ResponsesRequest",
}


def register() -> None:
    """Called by vLLM in each of its processes, possibly several times."""
    from vllm.v1.engine.core import EngineCore  # pyright: ignore[reportMissingImports]
    from vllm.v1.engine.input_processor import InputProcessor  # pyright: ignore[reportMissingImports]
    from vllm.v1.worker.worker_base import WorkerBase  # pyright: ignore[reportMissingImports]

    _wrap(InputProcessor, "__init__", _know_adapters)
    _wrap(InputProcessor, "process_inputs", _read_steering)
    _wrap(EngineCore, "add_request", _admit)
    _wrap(WorkerBase, "__init__", _steer_after_loading)
    EngineCore.yapo_load = lambda self, name, source: _adapters_of(self).load(name, source)
    EngineCore.yapo_unload = lambda self, name: _adapters_of(self).unload(name)


def _wrap(owner: type, name: str, around: Callable[..., Any]) -> None:
    """Replaces a method by `around(original, self, ...)`, once."""
    original = getattr(owner, name)
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(original, self, *args, **kwargs)

    setattr(method, _MARK, True)
    setattr(owner, name, method)


def _know_adapters(original: Callable[..., None], processor: Any, *args: Any, **kwargs: Any) -> None:
    """Checks the adapters of a frontend process before a worker starts."""
    original(processor, *args, **kwargs)
    if _is_active():
        _frontend_of(processor)
    for name, request in _HTTP.items():
        protocol = sys.modules.get(f"vllm.entrypoints.openai.{name}.protocol")
        if protocol is not None:
            made = getattr(protocol, request)
            # Errors in a request are raised before the first event of a stream.
            _wrap(made, "to_sampling_params", functools.partial(_check_early, weakref.ref(processor)))
            if hasattr(made, "to_beam_search_params"):
                _wrap(made, "to_beam_search_params", _search_beams)


def _read_steering(original: Callable[..., Any], processor: Any, *args: Any, **kwargs: Any) -> Any:
    request = original(processor, *args, **kwargs)
    return _frontend_of(processor).read(request) if _mentions(request.sampling_params) else request


def _check_early(processor: Any, original: Callable[..., Any], request: Any, *args: Any, **kwargs: Any) -> Any:
    parameters = original(request, *args, **kwargs)
    if _mentions(parameters) and (reader := processor()) is not None:
        _frontend_of(reader).asked_for(parameters.extra_args)
    return parameters


def _search_beams(original: Callable[..., Any], request: Any, *args: Any, **kwargs: Any) -> Any:
    if KEY in (request.vllm_xargs or {}):
        from .frontend import validation_error

        raise validation_error("Beam search cannot steer: leave out use_beam_search or 'yapo'.")
    return original(request, *args, **kwargs)


def _frontend_of(processor: Any) -> Any:
    from .frontend import Frontend

    return Frontend.of(processor)


def _admit(original: Callable[..., None], engine: Any, request: Any, *args: Any, **kwargs: Any) -> None:
    """Schedules a request, unless one of its adapters is gone."""
    if not _mentions(request.sampling_params) or _adapters_of(engine).admits(request):
        original(engine, request, *args, **kwargs)


def _adapters_of(engine: Any) -> Any:
    """The adapters of an engine, created on first use: the engine loads this plugin within its own `__init__`."""
    if not hasattr(engine, "yapo"):
        from .engine import EngineAdapters

        engine.yapo = EngineAdapters(engine)
    return engine.yapo


def _steer_after_loading(original: Callable[..., None], worker: Any, *args: Any, **kwargs: Any) -> None:
    """Attaches steering to a worker's model once it is loaded, before it is compiled."""
    original(worker, *args, **kwargs)
    if not _is_active():
        return
    load_model = worker.load_model

    def load_and_attach(*args: Any, **kwargs: Any) -> Any:
        from .settings import Settings
        from .worker import attach

        loaded = load_model(*args, **kwargs)
        worker.yapo = attach(worker.model_runner, Settings.of())
        return loaded

    worker.load_model = load_and_attach
    # The engine calls these by name, with collective_rpc.
    worker.yapo_read = lambda fields: worker.yapo.read(fields)
    worker.yapo_place = lambda: worker.yapo.place()


def _is_active() -> bool:
    """Whether this server steers; if not, nothing of `yapo_peft` is imported."""
    return bool(os.environ.get("YAPO_ADAPTERS") or os.environ.get("YAPO_LAYERS"))


def _mentions(parameters: Any) -> bool:
    """Whether sampling parameters have the key, in upper or lower case."""
    arguments = getattr(parameters, "extra_args", None)
    return bool(arguments) and any(key.casefold() == KEY for key in arguments)
