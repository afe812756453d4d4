"""Models by name, with or without an adapter."""

from __future__ import annotations

from typing import Any

from yapo_peft import ConfigError, YaPOError


def load_model(name: str, dtype: str = "auto") -> tuple[Any, Any]:
    """A model, or a model with an adapter, and its tokenizer.

    Args:
        name: Name or path of either; an adapter says which model it is for.
        dtype: Of the model's weights, such as "bfloat16"; "auto" as they are saved.

    Raises:
        ConfigError: There is no such dtype.
    """
    import torch
    from peft import AutoPeftModelForCausalLM, PeftConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ConfigError(f"dtype={dtype!r}: give 'auto', or a type of torch such as 'bfloat16'.")
    try:
        base = PeftConfig.from_pretrained(name).base_model_name_or_path
    except YaPOError:
        raise
    except ValueError:  # PEFT's way to say that there is no adapter
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype), AutoTokenizer.from_pretrained(name)
    model = AutoPeftModelForCausalLM.from_pretrained(name, dtype=dtype)
    try:
        # A trainer saves it with the adapter, with the chat template that was trained on.
        return model, AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):
        return model, AutoTokenizer.from_pretrained(base)
