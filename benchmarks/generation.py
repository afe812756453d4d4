"""Benchmarks greedy decoding (unsteered, ours, and the published form, in turn) and loading an adapter.

The code has entries of both signs, so some of its features have to be computed for every token.

    python benchmarks/generation.py --features 4608 65536
    python benchmarks/generation.py --quick
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from embedded import load_model_and_tokenizer, sae_folder, sae_layer
from published import Published, pairs_of, random_sae, report
from training import hidden_states

from yapo_peft import YaPOConfig, steering
from yapo_peft.tuner.adapters import steered_layers

SIDES = ("unsteered", "ours", "published")


def measure(options: argparse.Namespace, features: int, folder: Path) -> dict[str, Any]:
    """Milliseconds per token and their ratios to unsteered decoding, and seconds to load the adapter."""
    dataset = pairs_of(None)
    model, tokenizer = load_model_and_tokenizer()
    sae = sae_folder()
    if features != 4608:
        sae = random_sae(
            features, hidden_states(model, tokenizer, dataset, sae_layer()), 70, folder / f"sae-{features}"
        )
    published = Published(model, sae_layer(), sae)
    model = get_peft_model(model, YaPOConfig(layers=sae_layer(), sae_path=sae)).eval()
    code = torch.zeros(features)
    code[torch.randperm(features)[: options.entries]] = torch.randn(options.entries) * 0.1
    (layer,) = steered_layers(model)
    layer.yapo_code["default"].data.copy_(code)
    published.code.data.copy_(code)
    message = [{"role": "user", "content": "Tell me about the sea."}]
    prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    settings = {"max_new_tokens": options.tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    answers: dict[str, Any] = {}
    for _ in range(options.repeats + 1):
        for side in SIDES:
            multiplier = 1.0 if side == "ours" else 0.0
            published.multiplier = 1.0 if side == "published" else None
            started = time.perf_counter()
            with torch.no_grad(), steering(model, multiplier):
                answers[side] = model.generate(**prompt, **settings)
            seconds[side].append((time.perf_counter() - started) / options.tokens)
    published.multiplier = None
    medians = {side: 1000 * statistics.median(values[1:]) for side, values in seconds.items()}
    # Ratios of runs that follow each other, because the machine's speed drifts.
    ratios = {
        side: statistics.median(a / b for a, b in zip(seconds[side][1:], seconds["unsteered"][1:], strict=True))
        for side in ("ours", "published")
    }
    return {
        "features": features,
        "entries of the code": options.entries,
        "milliseconds per token": medians,
        "relative to unsteered": ratios,
        "same answer as published": bool(torch.equal(answers["ours"], answers["published"])),
        "seconds to load": loading(model, folder, sae),
    }


def loading(model: PeftModel, folder: Path, sae: str) -> dict[str, float]:
    """Seconds to load the adapter onto a model with and without its SAE, each in its own process."""
    seconds = {}
    for self_contained in (True, False):
        model.peft_config["default"].self_contained = self_contained
        target = folder / f"adapter-{self_contained}"
        model.save_pretrained(target)
        command = [sys.executable, __file__, "--load", str(target)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        seconds["self-contained" if self_contained else "with the SAE"] = float(printed.splitlines()[-1])
    return seconds


def load(adapter: str) -> None:
    """Prints how long it takes to load an adapter."""
    model, _ = load_model_and_tokenizer()
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    if "True" not in adapter:
        import sae_lens  # noqa: F401  excluded from the loading time
    started = time.perf_counter()
    PeftModel.from_pretrained(model, adapter)
    print(time.perf_counter() - started)


def main() -> None:
    """Prints the results for each number of features."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", nargs="+", type=int, default=[4608, 65536], help="4608 is the embedded SAE")
    parser.add_argument("--entries", type=int, default=1000, help="non-zero entries of the code")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="only the embedded SAE and few tokens, in under a minute")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        load(options.load)
        return
    if options.quick:
        options.features, options.tokens, options.repeats = [4608], 16, 3
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        report({"generation": [measure(options, features, Path(folder)) for features in options.features]}, options.out)


if __name__ == "__main__":
    main()
