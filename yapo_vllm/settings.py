"""The plugin's settings, from environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from yapo_peft.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    """The plugin's settings.

    Attributes:
        adapters: Folder or Hub id of each adapter that is served from the start, by name (`YAPO_ADAPTERS`).
        layers: Layers that adapters may steer, besides those of the first adapters (`YAPO_LAYERS`).
        max_adapters: Number of adapters loaded at once (`YAPO_MAX_ADAPTERS`).
        max_features: Number of features that one adapter may move at a layer; None for 256, or more if one of the
            first adapters moves more (`YAPO_MAX_FEATURES`).
        folders: Folders from which the routes may load adapters (`YAPO_FOLDERS`).
    """

    adapters: dict[str, str]
    layers: tuple[int, ...]
    max_adapters: int
    max_features: int | None
    folders: tuple[Path, ...] = ()

    @property
    def is_active(self) -> bool:
        """Whether the server can steer, now or with adapters loaded later."""
        return bool(self.adapters or self.layers)

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """Reads the settings.

        Raises:
            ConfigError: A variable has an invalid value.
        """
        adapters: dict[str, str] = {}
        for entry in _listed(environment, "YAPO_ADAPTERS"):
            name, is_named, source = entry.partition("=")
            source = source.strip() if is_named else name
            name = name.strip() if is_named else PurePosixPath(source).name
            if name in adapters:
                raise ConfigError(f"YAPO_ADAPTERS names {name!r} twice: rename one with name=folder.")
            # Shells do not expand ~ after a second equals sign.
            adapters[require_name(name)] = os.path.expanduser(source)  # noqa: PTH111 (also of Hub ids)
        layers = _listed(environment, "YAPO_LAYERS")
        if not all(layer.isdecimal() and len(layer) < 9 for layer in layers):
            given = environment["YAPO_LAYERS"][:200]
            raise ConfigError(f"YAPO_LAYERS={given!r}: must be indices of layers, such as 12,15.")
        max_adapters = _count(environment, "YAPO_MAX_ADAPTERS")
        if max_adapters is not None and max_adapters < len(adapters):
            raise ConfigError(f"YAPO_MAX_ADAPTERS={max_adapters}, but YAPO_ADAPTERS names {len(adapters)}.")
        return cls(
            adapters,
            tuple(sorted({int(layer) for layer in layers})),
            max(8, len(adapters)) if max_adapters is None else max_adapters,
            _count(environment, "YAPO_MAX_FEATURES"),
            tuple(Path(folder).expanduser().resolve() for folder in _listed(environment, "YAPO_FOLDERS")),
        )

    def allowed(self, path: str) -> str:
        """Returns the folder that a caller of the routes names, without links.

        Raises:
            ConfigError: It is in none of `folders`.
        """
        found = Path(path).expanduser().resolve()
        if not any(found.is_relative_to(folder) for folder in self.folders):
            raise ConfigError(
                f"path={path[:200]!r} is in none of the folders that this server loads adapters from: start it with "
                "YAPO_FOLDERS, a comma-separated list of them."
            )
        return str(found)


def require_name(name: object) -> str:
    """Returns the name if requests can use it.

    Raises:
        ConfigError: It has characters that the grammar of requests uses, or is empty or too long.
    """
    is_plain = isinstance(name, str) and 0 < len(name) <= 128 and name.isprintable() and name == name.strip()
    if not is_plain or any(mark in str(name) for mark in "=,[]{}"):
        raise ConfigError(
            f"name={str(name)[:200]!r}: must be printable, at most 128 characters, without '=', ',', brackets, or "
            "surrounding spaces."
        )
    return str(name)


def _listed(environment: Mapping[str, str], name: str) -> list[str]:
    return [entry.strip() for entry in environment.get(name, "").split(",") if entry.strip()]


def _count(environment: Mapping[str, str], name: str) -> int | None:
    value = environment.get(name, "").strip()
    if not value:
        return None
    if not value.isdecimal() or len(value) > 9 or not int(value):
        raise ConfigError(f"{name}={value[:200]!r}: must be a whole number, at least 1.")
    return int(value)
