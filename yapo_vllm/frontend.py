"""Steering where requests are read, in the process that answers users."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from yapo_peft.errors import ConfigError

from .adapters import Prepared, Served
from .plugin import KEY
from .request import cache_salt, steering_of
from .settings import Settings


class Frontend:
    """The adapters that requests can ask for.

    Attributes:
        adapters: Those that are served, by name.
    """

    def __init__(self, adapters: dict[str, Served]) -> None:
        self.adapters = adapters

    @classmethod
    def at_start(cls, model_config: Any) -> Frontend:
        """Reads and checks what the environment asks for, before a worker starts.

        Raises:
            ConfigError: A setting, or an adapter that it names, does not work.
        """
        settings = Settings.of()
        if not settings.is_active:
            return cls({})
        prepared = Prepared.of(settings, model_config)
        for adapter in prepared.adapters:
            prepared.require_room(adapter)
        return cls({adapter.name: adapter for adapter in prepared.adapters})

    def asked_for(self, arguments: Mapping[str, Any]) -> list[tuple[Served, float]] | None:
        """What extra arguments of a request ask for; None if they say nothing of steering.

        Raises:
            VLLMValidationError: They are malformed, or name an adapter that is not served.
        """
        named = [key for key in arguments if key.casefold() == KEY]
        if not named:
            return None
        if named != [KEY]:
            raise refusal(f"{named[0]!r} is written {KEY!r}.")
        try:
            return steering_of(arguments[KEY], self.adapters)
        except ConfigError as error:
            raise refusal(str(error)) from error

    def read(self, request: Any) -> Any:
        """Puts what a request asks for as the workers read it, and keeps its cached prefix apart from others.

        Args:
            request: vLLM's `EngineCoreRequest`, with parameters of its own.

        Raises:
            VLLMValidationError: It is malformed, or asks for an adapter that is not served.
        """
        parameters = request.sampling_params
        asked = (parameters.extra_args or {}) if parameters is not None else {}
        steering = self.asked_for(asked)
        if parameters is None or steering is None:
            return request
        # A new dict: the old one may be the caller's, who uses it for other requests.
        others = {name: value for name, value in asked.items() if name != KEY}
        if not steering:
            parameters.extra_args = others or None
            return request
        parameters.extra_args = {**others, KEY: [[adapter.id, multiplier] for adapter, multiplier in steering]}
        embeddings = request.prompt_embeds
        length = len(embeddings) if request.prompt_token_ids is None else len(request.prompt_token_ids)
        request.cache_salt = cache_salt(steering, length, request.cache_salt)
        return request


def refusal(message: str) -> Exception:
    """What vLLM answers with status 400."""
    from vllm.exceptions import VLLMValidationError  # pyright: ignore[reportMissingImports]

    return VLLMValidationError(message, parameter=KEY)
