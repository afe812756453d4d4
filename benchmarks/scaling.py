"""Scaling: how the cost of a training step grows with the SAE while the number of active features stays the same.

All sizes use random SAEs and train in one process, taking turns on the same batches: ours, on cached activations, at
every size, and the published form up to --published-up-to features.

    python benchmarks/scaling.py --data power-seeking.csv
    python benchmarks/scaling.py --quick
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from published import report
from training import prepare


class Side:
    """One SAE size: a manually stepped trainer of ours, and the published form where it is included."""

    def __init__(self, options: argparse.Namespace, features: int, folder: Path) -> None:
        with_published = features <= options.published_up_to
        self.trainer, sides = prepare(options, features, "published" if with_published else "ours", folder)
        self.published = sides.published
        self.trainer.current_gradient_accumulation_steps = 1
        self.trainer.create_optimizer()
        self.trainer.model.train()
        self.batches = list(self.trainer.get_train_dataloader())
        self.seconds: dict[str, list[float]] = {"ours": [], "published": []}

    def step(self, index: int) -> None:
        """Trains each form on one batch."""
        trainer, batch = self.trainer, self.batches[index % len(self.batches)]
        started = time.perf_counter()
        trainer.training_step(trainer.model, dict(batch))
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        self.seconds["ours"].append(time.perf_counter() - started)
        if self.published is not None:
            started = time.perf_counter()
            with trainer.model.disable_adapter():
                self.published.step(batch, 1.0 if index % 2 else -1.0)
            self.seconds["published"].append(time.perf_counter() - started)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds per step at each size, and their ratios to the smallest size."""
    sides = {features: Side(options, features, folder) for features in options.features}
    for index in range(options.steps + 1):
        for side in sides.values():
            side.step(index)
    rows = []
    for features, side in sides.items():
        seconds = {name: statistics.median(values[1:]) for name, values in side.seconds.items() if values}
        rows.append({"features": features, "seconds per step": seconds})
    smallest = rows[0]["seconds per step"]
    for row in rows:
        row["relative to the smallest"] = {
            name: value / smallest[name] for name, value in row["seconds per step"].items()
        }
    return {"scaling": rows}


def main() -> None:
    """Prints the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="CSV with question, matching, not_matching; defaults to an embedded set"
    )
    parser.add_argument("--features", nargs="+", type=int, default=[4608, 65536, 262144])
    parser.add_argument("--active", type=int, default=70, help="active features per token")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument(
        "--published-up-to", type=int, default=65536, help="largest SAE of the published form; 0 skips it"
    )
    parser.add_argument("--quick", action="store_true", help="only two sizes and few steps, in under a minute")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.set_defaults(embedded=None)
    options = parser.parse_args()
    if options.quick:
        options.features, options.pairs, options.steps, options.published_up_to = [4608, 16384], 8, 2, 4608
    with tempfile.TemporaryDirectory() as folder:
        report(measure(options, Path(folder)), options.out)


if __name__ == "__main__":
    main()
