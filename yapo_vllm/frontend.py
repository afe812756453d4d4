"""Reads the steering of requests, in the process of the API server or of `vllm.LLM`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from yapo_peft.errors import ConfigError

from . import KEY
from .request import cache_salt, steering_of
from .served import Prepared, Served
from .settings import Settings


class Frontend:
    """The adapters that requests can name.

    Attributes:
        adapters: The served adapters, by name.
    """

    def __init__(self, adapters: dict[str, Served]) -> None:
        self.adapters = adapters

    @classmethod
    def of(cls, processor: Any) -> Frontend:
        """Returns the frontend of vLLM's `InputProcessor`, created on first use as `at_start` does."""
        if not hasattr(processor, "yapo"):
            processor.yapo = cls.at_start(processor.model_config)
        return processor.yapo

    @classmethod
    def at_start(cls, model_config: Any) -> Frontend:
        """Reads and checks the environment's settings and adapters.

        Raises:
            ConfigError: A setting is invalid, or an adapter that it names cannot be served.
        """
        settings = Settings.of()
        if not settings.is_active:
            return cls({})
        prepared = Prepared.of(settings, model_config)
        for adapter in prepared.adapters:
            prepared.check_fits(adapter)
        return cls({adapter.name: adapter for adapter in prepared.adapters})

    def asked_for(self, arguments: Mapping[str, Any]) -> list[tuple[Served, float]] | None:
        """Returns the adapters and multipliers in the extra arguments of a request; None if it does not steer.

        Raises:
            VLLMValidationError: They are malformed, or name an adapter that is not served.
        """
        named = [key for key in arguments if key.casefold() == KEY]
        if not named:
            return None
        if named != [KEY]:
            raise validation_error(f"{named[0]!r} is spelt {KEY!r}.")
        try:
            return steering_of(arguments[KEY], self.adapters)
        except ConfigError as error:
            raise validation_error(str(error)) from error

    def read(self, request: Any) -> Any:
        """Encodes the steering of a request for the workers, and keeps its cached prefix apart from others.

        Args:
            request: vLLM's `EngineCoreRequest`, whose parameters are not shared with another request.

        Raises:
            VLLMValidationError: It is malformed, or asks for an adapter that is not served.
        """
        parameters = request.sampling_params
        asked = (parameters.extra_args or {}) if parameters is not None else {}
        steering = self.asked_for(asked)
        if parameters is None or steering is None:
            return request
        # A new dict, because the caller may use the old one for other requests.
        others = {name: value for name, value in asked.items() if name != KEY}
        if not steering:
            parameters.extra_args = others or None
            return request
        parameters.extra_args = {**others, KEY: [[adapter.id, multiplier] for adapter, multiplier in steering]}
        embeddings = request.prompt_embeds
        length = len(embeddings) if request.prompt_token_ids is None else len(request.prompt_token_ids)
        request.cache_salt = cache_salt(steering, length, request.cache_salt)
        return request


def validation_error(message: str) -> Exception:
    """The error that vLLM answers with status 400."""
    from vllm.exceptions import VLLMValidationError  # pyright: ignore[reportMissingImports]

    return VLLMValidationError(message, parameter=KEY)
