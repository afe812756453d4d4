"""Where the plugin takes hold of vLLM: the seams are few, and each leaves what it wraps as it is without steering."""

from __future__ import annotations

import functools
import os
import sys
import weakref
from collections.abc import Callable
from typing import Any

KEY = "yapo"
_MARK = "_yapo"
# The requests of the OpenAI server that steer, by the modules of vLLM that have them.
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
    """Where requests are read: what is to be served is checked before a worker starts."""
    original(processor, *args, **kwargs)
    if _is_active():
        frontend_of(processor)
    for name, request in _HTTP.items():
        protocol = sys.modules.get(f"vllm.entrypoints.openai.{name}.protocol")
        if protocol is not None:
            made = getattr(protocol, request)
            # What is wrong with a request is said before the first event of a stream.
            _wrap(made, "to_sampling_params", functools.partial(_check_early, weakref.ref(processor)))
            if hasattr(made, "to_beam_search_params"):
                _wrap(made, "to_beam_search_params", _search_beams)


def _read_steering(original: Callable[..., Any], processor: Any, *args: Any, **kwargs: Any) -> Any:
    request = original(processor, *args, **kwargs)
    return frontend_of(processor).read(request) if _mentions(request.sampling_params) else request


def _check_early(processor: Any, original: Callable[..., Any], request: Any, *args: Any, **kwargs: Any) -> Any:
    parameters = original(request, *args, **kwargs)
    if _mentions(parameters) and (reader := processor()) is not None:
        frontend_of(reader).asked_for(parameters.extra_args)
    return parameters


def _search_beams(original: Callable[..., Any], request: Any, *args: Any, **kwargs: Any) -> Any:
    if KEY in (request.vllm_xargs or {}):
        from .frontend import refusal

        raise refusal("Beam search cannot steer: leave use_beam_search out, or 'yapo'.")
    return original(request, *args, **kwargs)


def frontend_of(processor: Any) -> Any:
    """The adapters that requests can ask for."""
    if not hasattr(processor, "yapo"):
        from .frontend import Frontend

        processor.yapo = Frontend.at_start(processor.model_config)
    return processor.yapo


def _admit(original: Callable[..., None], engine: Any, request: Any, *args: Any, **kwargs: Any) -> None:
    """Where requests are scheduled."""
    if not _mentions(request.sampling_params) or _adapters_of(engine).admits(request):
        original(engine, request, *args, **kwargs)


def _adapters_of(engine: Any) -> Any:
    """The adapters that an engine holds; engines load this plugin while they are being made, too late for more."""
    if not hasattr(engine, "yapo"):
        from .engine import EngineAdapters

        engine.yapo = EngineAdapters(engine)
    return engine.yapo


def _steer_after_loading(original: Callable[..., None], worker: Any, *args: Any, **kwargs: Any) -> None:
    """Where the model runs: its blocks are steered from before they are compiled."""
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
    # Called by name from the engine, through its collective calls.
    worker.yapo_read = lambda fields: worker.yapo.read(fields)
    worker.yapo_place = lambda: worker.yapo.place()


def _is_active() -> bool:
    """Whether this server steers; if not, it shall not even import what that takes."""
    return bool(os.environ.get("YAPO_ADAPTERS") or os.environ.get("YAPO_LAYERS"))


def _mentions(parameters: Any) -> bool:
    """Whether sampling parameters have anything to do with steering, misspelt or not."""
    arguments = getattr(parameters, "extra_args", None)
    return bool(arguments) and any(key.casefold() == KEY for key in arguments)
