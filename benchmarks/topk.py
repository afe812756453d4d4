"""A TopK SAE converted to JumpReLU: what the conversion changes, the size of the adapter, and the cost of decoding.

Reads the embedded SAE as a TopK SAE, with its mean number of active features as k, trains a code of few features on it,
and converts it. Effects (the change in the margin between chosen and rejected answers of held-out pairs from multiplier
0 to +1 and -1) are measured on pairs that training did not see, and what the conversion changes on a quarter of the
text.

    python benchmarks/topk.py --data train.csv --text neutral.txt --out topk.json
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from embedded import load_model_and_tokenizer, sae_folder, sae_layer
from published import cached_arguments, pairs_of, report
from training import hidden_states

from yapo_cli.options import paragraphs
from yapo_peft import YaPOConfig, YaPOTrainer, YaPOTrainingConfig, steering, sweep
from yapo_peft.methods import convert_to_jumprelu
from yapo_peft.scoring.neutral import packaged_text
from yapo_peft.trainer.config import PUBLISHED
from yapo_peft.tuner.adapters import steered_layers


def topk_sae(hidden: torch.Tensor, folder: Path, copies: int) -> tuple[str, int]:
    """Saves the embedded SAE as a TopK SAE, beside rotated copies of its features; returns its folder and k."""
    from sae_lens import SAE, TopKSAE, TopKSAEConfig

    sae = SAE.load_from_disk(sae_folder()).float()
    k = round(float((sae.encode(hidden) > 0).sum(-1).float().mean()))
    cfg = {"d_in": sae.cfg.d_in, "apply_b_dec_to_input": sae.cfg.apply_b_dec_to_input}
    wide = TopKSAE(TopKSAEConfig(**cfg, d_sae=copies * sae.cfg.d_sae, k=k, rescale_acts_by_decoder_norm=False))
    rotations = [torch.linalg.qr(torch.randn(sae.cfg.d_in, sae.cfg.d_in))[0] for _ in range(copies - 1)]
    encoders = [sae.W_enc.data, *(rotation @ sae.W_enc.data for rotation in rotations)]
    decoders = [sae.W_dec.data, *(sae.W_dec.data @ rotation.T for rotation in rotations)]
    biases = torch.cat([sae.b_enc.data] * copies)
    state = {"W_enc": torch.cat(encoders, 1), "W_dec": torch.cat(decoders), "b_enc": biases, "b_dec": sae.b_dec.data}
    wide.load_state_dict(state)
    wide.cfg.metadata.hook_name = json.loads((Path(sae_folder()) / "cfg.json").read_text())["metadata"]["hook_name"]
    wide.save_model(folder)
    return str(folder), k


def trained(model: Any, tokenizer: Any, options: argparse.Namespace, pairs: Any, folder: Path) -> None:
    """Trains a code of few features with a bound on its damage."""
    args = cached_arguments(
        folder,
        "activations",
        max_steps=options.steps,
        max_features=options.features,
        **{name: getattr(YaPOTrainingConfig, name) for name in PUBLISHED if name != "num_train_epochs"},
    )
    known = packaged_text()[:4] if options.quick else None
    YaPOTrainer(model, args, train_dataset=pairs, neutral_dataset=known, processing_class=tokenizer).train()


def size_of(model: Any, folder: Path) -> int:
    """Bytes of the saved adapter."""
    model.peft_config["default"].self_contained = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the encoder is large
        model.save_pretrained(folder)
    size = (folder / "adapter_model.safetensors").stat().st_size
    shutil.rmtree(folder)
    return size


def decoding(model: Any, both: dict[str, Any], tokenizer: Any, tokens: int, repeats: int) -> dict[str, float]:
    """The time of greedy decoding at multiplier 1 relative to multiplier 0, with each SAE, in turn."""
    (layer,) = steered_layers(model)
    message = [{"role": "user", "content": "Tell me about the sea."}]
    prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    settings = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    seconds: dict[str, list[float]] = {name: [] for name in ("unsteered", *both)}
    for _ in range(repeats + 1):
        for name, times in seconds.items():
            layer.yapo_sae["default"] = both.get(name, layer.yapo_sae["default"])
            with torch.no_grad(), steering(model, 0.0 if name == "unsteered" else 1.0):
                model.generate(**prompt, **{**settings, "max_new_tokens": 1})  # folds the code
                started = time.perf_counter()
                model.generate(**prompt, **settings)
                times.append(time.perf_counter() - started)
    return {
        name: statistics.median(a / b for a, b in zip(seconds[name][1:], seconds["unsteered"][1:], strict=True))
        for name in both
    }


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Trains, converts and measures."""
    pairs = pairs_of(options.data).filter(lambda pair: pair["prompt"][0]["content"].strip()).shuffle(seed=0)
    held_out = pairs.select(range(len(pairs) - options.held_out, len(pairs)))
    model, tokenizer = load_model_and_tokenizer()
    sae, k = topk_sae(hidden_states(model, tokenizer, pairs, sae_layer()), folder / "sae", options.copies)
    model = get_peft_model(model, YaPOConfig(layers=sae_layer(), sae_path=sae))
    trained(model, tokenizer, options, pairs.select(range(options.pairs)), folder)
    model.eval()
    (layer,) = steered_layers(model)
    before = layer.yapo_sae["default"]

    def effects() -> list[float]:
        down, off, up = sweep(model, held_out, tokenizer, (-1.0, 0.0, 1.0), batch_size=16).summary()["margin"]
        return [float(up - off), float(down - off)]

    results: dict[str, Any] = {"features": before.identity.d_sae, "k": k}
    results["features of the code"] = int(layer.code("default").count_nonzero())
    results["effects with TopK"], results["bytes with TopK"] = effects(), size_of(model, folder / "topk")
    text = packaged_text()[:8] if options.quick else None
    if options.text:
        text = paragraphs(options.text)
    results |= convert_to_jumprelu(model, tokenizer, text)
    results["effects with JumpReLU"], results["bytes with JumpReLU"] = effects(), size_of(model, folder / "jump")
    after = layer.yapo_sae["default"]
    both = {"TopK": before, "JumpReLU": after}
    results["decoding / unsteered"] = decoding(model, both, tokenizer, options.tokens, options.repeats)
    return results


def main() -> None:
    """Prints the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="CSV with question, matching, not_matching; defaults to an embedded set"
    )
    parser.add_argument(
        "--text", type=Path, help="text to convert on, of which a quarter is held out; by default the package's"
    )
    parser.add_argument("--copies", type=int, default=1, help="copies of the 4,608 features; 14 for about 65,000")
    parser.add_argument("--features", type=int, default=64, help="features of the code")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="a few steps, as a smoke test")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if options.quick:
        options.features, options.pairs, options.held_out, options.steps = 16, 8, 4, 3
        options.tokens, options.repeats = 4, 1
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        report({"topk": run(options, Path(folder))}, options.out)


if __name__ == "__main__":
    main()
