"""Tests whether one learning rate works for SAEs of different scales: held-out loss by learning rate, for several SAEs.

A code is trained for each SAE and learning rate, which is given in units of a typical activation; the results also list
it in the units of the SAE's own features. The embedded SAE is always included; further SAEs are folders of SAEs of the
embedded model, as `yapo sae train` writes them.

    python benchmarks/learning_rates.py --sae runs/layer-8 runs/layer-22 --data train.csv --out rates.json
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from peft import get_peft_model

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from embedded import load_model_and_tokenizer, sae_folder, sae_layer
from published import cached_arguments, pairs_of, report

from yapo_peft import YaPOConfig, YaPOTrainer


def trained(sae: Path, rate: float, pairs: Any, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Trains a code on the first pairs, and evaluates it on the last ones."""
    model, tokenizer = load_model_and_tokenizer()
    model = get_peft_model(model, YaPOConfig(layers=sae_layer(sae), sae_path=str(sae)))
    args = cached_arguments(
        folder,
        "activations",
        max_steps=options.steps,
        warmup_steps=options.steps // 10,
        learning_rate=rate,
        learning_rate_unit="activation",
    )
    trainer = YaPOTrainer(
        model,
        args,
        train_dataset=pairs.select(range(options.pairs)),
        eval_dataset=pairs.select(range(len(pairs) - options.held_out, len(pairs))),
        processing_class=tokenizer,
    )
    (unit,) = trainer._units.values()
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    return {"layer": sae_layer(sae), "unit": unit, "rate": rate, "raw rate": rate * unit, "held-out loss": loss}


def main() -> None:
    """Prints the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sae", nargs="*", type=Path, default=[], help="folders of further SAEs")
    parser.add_argument(
        "--data", type=Path, help="CSV with question, matching, not_matching; defaults to an embedded set"
    )
    parser.add_argument("--rates", nargs="+", type=float, default=[0.001, 0.003, 0.01, 0.03])
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--held-out", type=int, default=32)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--quick", action="store_true", help="a few steps on few pairs, as a smoke test")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if options.quick:
        options.rates, options.pairs, options.held_out, options.steps = [0.01, 0.03], 8, 4, 2
    pairs = pairs_of(options.data).shuffle(seed=0)
    if options.pairs + options.held_out > len(pairs):
        parser.error(f"--pairs {options.pairs} --held-out {options.held_out}: only {len(pairs)} pairs are available")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for sae in (Path(sae_folder()), *options.sae):
            for rate in options.rates:
                results.append(trained(sae, rate, pairs, options, Path(folder)))
                print(results[-1], flush=True)
    report({"learning_rates": results}, options.out)


if __name__ == "__main__":
    main()
