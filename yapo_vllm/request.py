"""Parses the steering of a request, and derives the salt of its cached prefix."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from yapo_peft.errors import ConfigError
from yapo_peft.tuner.positions import span_of

from . import KEY
from .served import Served

Steering = list[tuple[int, float]]
# No trained code needs a larger multiplier, which could overflow half precision.
_LARGEST = 1000.0
_EXAMPLES = '{"adapter": "polite", "multiplier": 1.5}, a list of these, or "polite=1.5,brief=-0.5"'


def steering_of(value: Any, adapters: Mapping[str, Served]) -> list[tuple[Served, float]]:
    """Parses the adapters and multipliers of a request; adapters at multiplier 0 are left out.

    Args:
        value: The request's value of "yapo": an object, or a list of objects, with "adapter" and optionally
            "multiplier" (default: the adapter's own); or a string such as "polite=1.5,brief=-0.5", or a list of these.
        adapters: The served adapters, by name.

    Raises:
        ConfigError: It is malformed, names an adapter that is not served, or a multiplier that one does not support.
    """
    found: dict[str, tuple[Served, float]] = {}
    for name, given in _entries(value):
        if name not in adapters:
            served = ", ".join(map(repr, sorted(adapters))) or "none"
            raise ConfigError(f"There is no adapter {_short(name)}. Served: {served}.")
        if name in found:
            raise ConfigError(f"Adapter {name!r} is named twice in one request.")
        adapter = adapters[name]
        multiplier = _multiplier(name, adapter.multiplier if given is None else given)
        if multiplier and (1 if multiplier > 0 else -1) not in adapter.signs:
            raise ConfigError(
                f"Adapter {name!r} lowers features of a TopK SAE at multiplier {multiplier:g}, but its file has no "
                "encoder for that: serve it with self_contained=False, or converted (yapo convert)."
            )
        found[name] = adapter, multiplier
    return sorted(((a, s) for a, s in found.values() if s), key=lambda pair: pair[0].id)


def scheduled_steering(request: Any) -> Steering:
    """Returns the adapter ids and multipliers of a request that the frontend has read; empty if it does not steer."""
    parameters = request.sampling_params
    return ((parameters.extra_args or {}).get(KEY) or []) if parameters is not None else []


def cache_salt(steering: list[tuple[Served, float]], prompt_length: int, salt: str | None) -> str:
    """Returns a salt that lets requests share a cached prefix only if they steer it alike.

    Which tokens are steered is part of the salt: tokens that one request generated, steered, are another request's
    prompt, not steered.
    """
    key = [[a.digest, s.hex(), *span_of(a.positions).within(prompt_length)] for a, s in steering]
    return "yapo:" + hashlib.sha256(json.dumps([salt, key]).encode()).hexdigest()


def _entries(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"yapo={_short(value)} is not valid JSON ({error}). Give {_EXAMPLES}.") from error
    entries: list[tuple[str, Any]] = []
    for entry in value if isinstance(value, list | tuple) else [value]:
        if isinstance(entry, Mapping):
            entries.append(_of_object(entry))
        elif isinstance(entry, str):
            entries += [_of_text(part) for part in entry.split(",") if part.strip()]
        else:
            raise ConfigError(f"yapo={_short(value)}: give {_EXAMPLES}.")
    if not entries:
        raise ConfigError(f"yapo={_short(value)} names no adapter: give {_EXAMPLES}, or leave it out.")
    return entries


def _of_object(entry: Mapping[str, Any]) -> tuple[str, Any]:
    unknown = sorted({*map(str, entry)} - {"adapter", "multiplier"})
    if unknown:
        raise ConfigError(f"yapo={_short(dict(entry))}: unknown key {_short(unknown[0])}. Give {_EXAMPLES}.")
    if not isinstance(entry.get("adapter"), str):
        raise ConfigError(f"yapo={_short(dict(entry))}: 'adapter' must be a name. Give {_EXAMPLES}.")
    return entry["adapter"], entry.get("multiplier")


def _of_text(entry: str) -> tuple[str, Any]:
    name, is_given, multiplier = entry.partition("=")
    if not is_given:
        return name.strip(), None
    try:
        # Python accepts underscores in numbers; here they are more likely a typo.
        return name.strip(), float(multiplier.replace("_", "?"))
    except ValueError as error:
        raise ConfigError(f"yapo={_short(entry)}: {_short(multiplier)} is not a number. Give {_EXAMPLES}.") from error


def _multiplier(name: str, multiplier: Any) -> float:
    is_number = isinstance(multiplier, int | float) and not isinstance(multiplier, bool)
    # Compared first: an integer can be too large to become a float.
    if not is_number or multiplier != multiplier or abs(multiplier) == math.inf:
        raise ConfigError(f"The multiplier of {name!r} is {_short(multiplier)}: must be a finite number, such as -0.5.")
    if abs(multiplier) > _LARGEST:
        raise ConfigError(
            f"The multiplier of {name!r} is {_short(multiplier)}: must be between -{_LARGEST:g} and {_LARGEST:g}."
        )
    return float(multiplier)


def _short(value: Any) -> str:
    """The `repr` of a value, shortened for error messages."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return "a number of very many digits"
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"
