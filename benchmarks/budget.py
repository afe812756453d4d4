"""What a damage budget costs: training steps with and without it, in turn on the same batches and the same code, and
the estimate that training starts from.

python benchmarks/budget.py --data power-seeking.csv
python benchmarks/budget.py --quick
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from embedded import load_model_and_tokenizer, sae_folder, sae_layer
from published import cached_arguments, pairs_of, report

from yapo_peft import YaPOConfig, YaPOTrainer
from yapo_peft.trainer.selection import StartOnFeatures


def seconds(trainer: YaPOTrainer, batch: dict[str, Any]) -> float:
    """Seconds of one step's forward and backward pass."""
    started = time.perf_counter()
    trainer.compute_loss(trainer.model, dict(batch)).backward()
    return time.perf_counter() - started


def seconds_of_start(trainer: YaPOTrainer) -> float:
    """Seconds until the code has its first entries."""
    start = next(each for each in trainer.callback_handler.callbacks if isinstance(each, StartOnFeatures))
    started = time.perf_counter()
    start.on_train_begin(trainer.args, trainer.state, trainer.control)
    return time.perf_counter() - started


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds per step of both sides, and their ratio, when rows of neutral text are new and when they are known."""
    pairs = pairs_of(options.data)
    pairs = pairs.select(range(min(options.pairs, len(pairs))))
    model, tokenizer = load_model_and_tokenizer()
    model = get_peft_model(model, YaPOConfig(layers=sae_layer(), sae_path=sae_folder()))

    def made(bound: float | None) -> YaPOTrainer:
        args = cached_arguments(folder, "activations", max_kl=bound)
        return YaPOTrainer(model, args, train_dataset=pairs, processing_class=tokenizer)

    start = seconds_of_start(made(0.1))
    sides = {"without": made(None), "with": made(0.1)}
    code = sides["with"]._layers[0].yapo_code["default"]
    code.data.normal_(std=0.1)
    model.train()
    found: dict[str, dict[str, list[float]]] = {}
    for rows in ("new", "known"):
        found[rows] = {name: [] for name in sides}
        batches = sides["without"].get_train_dataloader()
        for step, batch in zip(range(options.steps), batches, strict=False):
            for name, trainer in sides.items():
                trainer.state.global_step = step
                found[rows][name].append(seconds(trainer, batch))
                code.grad = None
    medians = {rows: {name: statistics.median(values[1:]) for name, values in of.items()} for rows, of in found.items()}
    ratios = {
        f"rows of text {rows}": {"seconds per step": of, "with / without": of["with"] / of["without"]}
        for rows, of in medians.items()
    }
    return {**ratios, "start": {"seconds": start, "in steps with it": start / medians["known"]["with"]}}


def main() -> None:
    """Prints the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="CSV with question, matching, not_matching; defaults to an embedded set"
    )
    parser.add_argument("--pairs", type=int, default=160)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="a few steps, as a smoke test")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if options.quick:
        options.pairs, options.steps = 8, 2
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        report({"budget": run(options, Path(folder))}, options.out)


if __name__ == "__main__":
    main()
