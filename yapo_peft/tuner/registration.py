"""Registers the method with PEFT."""

from __future__ import annotations

from typing import cast

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils.peft_types import PeftType

from .config import YaPOConfig, YaPOPeftType
from .model import YaPOModel


def register() -> None:
    """Registers the method with PEFT; does nothing if it is registered already.

    PEFT's `register_peft_method` only accepts names of its closed enumeration, so this writes its tables directly, with
    the same checks.

    Raises:
        RuntimeError: The name or the prefix is taken.
    """
    name = cast(PeftType, YaPOPeftType.YAPO)
    if PEFT_TYPE_TO_CONFIG_MAPPING.get(name) is YaPOConfig:
        return
    prefixes = [prefix for key, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items() if key != name]
    if name in PEFT_TYPE_TO_TUNER_MAPPING or YaPOModel.prefix in prefixes:
        raise RuntimeError(
            f"PEFT already has a method named {name.value!r} or a prefix {YaPOModel.prefix!r}: use that one, and do "
            "not import yapo_peft beside it."
        )
    PEFT_TYPE_TO_PREFIX_MAPPING[name] = YaPOModel.prefix
    PEFT_TYPE_TO_CONFIG_MAPPING[name] = YaPOConfig
    PEFT_TYPE_TO_TUNER_MAPPING[name] = YaPOModel
