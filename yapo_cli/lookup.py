"""Tells adapters from models, by their folders or Hub repositories, before anything large is loaded."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError, RepositoryNotFoundError
from peft import PeftConfig

from yapo_peft import AdapterFileError, ConfigError, YaPOConfig, YaPOError


@cache
def adapter_config(name: str) -> PeftConfig | None:
    """The config of an adapter; None if `name` is a model."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not any((folder / file).is_file() for file in ("adapter_config.json", "config.json")):
            inner = sorted(file.parent for file in folder.glob("*/adapter_config.json"))
            hint = f" {inner[0]} has an adapter." if inner else ""
            raise ConfigError(f"The folder {name!r} has neither an adapter nor a model.{hint}")
    elif name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ConfigError(f"There is no folder {name!r}.")
    elif not _has_adapter(name):
        return None
    try:
        return PeftConfig.from_pretrained(name)
    except YaPOError:
        raise
    except (ValueError, TypeError, KeyError, RecursionError) as error:  # the first also if there is no adapter
        if (Path(name) / "adapter_config.json").is_file():
            raise AdapterFileError(f"{name}/adapter_config.json cannot be read: {error}") from error
        return None


def is_adapter(name: str) -> bool:
    """Whether a folder or Hub repository has a YaPO adapter."""
    return isinstance(adapter_config(name), YaPOConfig)


def require_adapter(name: str, any_method: bool = False) -> None:
    """Raises `ConfigError` unless `name` is a YaPO adapter, or an adapter of any method."""
    if not is_adapter(name) and not (any_method and adapter_config(name) is not None):
        raise ConfigError(f"{name!r} is not {'an' if any_method else 'a YaPO'} adapter: pass an adapter.")


def require_one_model(adapters: list[str]) -> None:
    """Raises `ConfigError` unless all are adapters, and of the same model."""
    for name in adapters:
        require_adapter(name)
    of = [getattr(adapter_config(name), "base_model_name_or_path", None) for name in adapters]
    for name, model in zip(adapters, of, strict=True):
        if model != of[0]:
            raise ConfigError(
                f"{name} is for another model than {adapters[0]}: {model}, not {of[0]}. If they are the same, pass "
                "--model with where it is."
            )


def _has_adapter(name: str) -> bool:
    """Whether a Hub repository, or its copy in the cache, has an adapter."""
    try:
        if isinstance(try_to_load_from_cache(name, "adapter_config.json"), str):
            return True
        # Unlike downloads, this is not repeated for half a minute if there is no connection.
        get_hf_file_metadata(hf_hub_url(name, "adapter_config.json"))
    except EntryNotFoundError:
        return False
    except HFValidationError as error:
        raise ConfigError(f"There is no folder {name!r}.") from error
    except Exception as error:  # of the library for HTTP, too
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return False
        is_missing = isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError)
        reason = (
            "no such repository that you can read on the Hub" if is_missing else f"the Hub could not be read: {error}"
        )
        raise ConfigError(f"There is no folder {name!r}, and {reason}".rstrip(".") + ".") from error
    return True
