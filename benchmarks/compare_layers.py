"""Compares layers by how well a code trained there steers, and how much it damages unrelated text.

For each SAE and learning rate, trains a code on an embedded preference set for the same number of steps. Then measures
accuracy and margin on the held-out pairs at multipliers -1, 0 and +1, and the KL from the unsteered model on unrelated
text at -1 and +1. A good layer moves the margin far at a low KL.

    python benchmarks/compare_layers.py --sae runs/sae-11 runs/sae-14 --text heldout.txt --set enthusiasm
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from peft import get_peft_model

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from embedded import load_model_and_tokenizer, preferences

from yapo_peft import YaPOConfig, YaPOTrainer, YaPOTrainingConfig, sweep
from yapo_peft.evaluation import Damage


def main() -> None:
    """Prints a row per SAE and learning rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sae", nargs="+", required=True, help="folders of SAEs, one per layer to compare")
    parser.add_argument("--text", type=Path, required=True, help="file of unrelated text to measure the damage on")
    parser.add_argument("--set", default="enthusiasm", help="embedded preference set")
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[1e-2, 3e-2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument(
        "--bf16", action="store_true", help="run the model in bfloat16, which is faster on CPUs with AMX"
    )
    parser.add_argument("--out", type=Path, help="JSON lines file to append the results to")
    options = parser.parse_args()

    print("layer  rate   acc -1    0   +1   margin -1     0    +1       KL -1   +1  (nats/token)")
    for folder in options.sae:
        layer = int(json.loads((Path(folder) / "cfg.json").read_text())["metadata"]["hook_name"].split(".")[1])
        for rate in options.learning_rates:
            row = {"layer": layer, "learning_rate": rate, **measure(folder, layer, rate, options)}
            acc, margin, damage = row["accuracy"], row["margin"], row["damage"]
            print(
                f"{layer:5d} {rate:5.3f}     {acc[0]:4.2f} {acc[1]:4.2f} {acc[2]:4.2f}     "
                f"{margin[0]:5.1f} {margin[1]:5.1f} {margin[2]:5.1f}      {damage[0]:5.2f} {damage[1]:5.2f}",
                flush=True,
            )
            if options.out is not None:
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")


def measure(folder: str, layer: int, rate: float, options: argparse.Namespace) -> dict[str, list[float]]:
    """Trains a code for one layer, and evaluates it."""
    model, tokenizer = load_model_and_tokenizer()
    model = model.to(torch.bfloat16 if options.bf16 else torch.float32)
    model = get_peft_model(model, YaPOConfig(layers=layer, sae_path=folder, task_type="CAUSAL_LM"))
    with tempfile.TemporaryDirectory() as out:
        args = YaPOTrainingConfig(
            output_dir=out,
            max_steps=options.steps,
            learning_rate=rate,
            learning_rate_unit="raw",
            warmup_steps=5,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
        )
        train = preferences(options.set, "train")
        trainer = YaPOTrainer(model, args, train_dataset=train, processing_class=tokenizer)
        trainer.train()
    scores = sweep(model, preferences(options.set, "test"), tokenizer, (-1, 0, 1)).summary()
    text = [options.text.read_text()]
    damage = sweep(model, text, tokenizer, (-1, 1), measure=Damage(block_size=128, max_blocks=32)).summary()
    return {
        "accuracy": scores["accuracy"].tolist(),
        "margin": scores["margin"].tolist(),
        "damage": damage["kl"].tolist(),
    }


if __name__ == "__main__":
    main()
