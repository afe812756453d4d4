"""Time to quality: how long ours takes, including the cache, to reach the final held-out loss of the published form.

Both train in one process, taking turns, each on its own clock that excludes evaluation. The published form trains on
all pairs, with one direction per batch and Adam's default epsilon. Ours trains once on part of the pairs, with one
direction per pair and an epsilon about as large as the gradient of a common feature: with a smaller one, Adam takes
full-size steps along the noise of thousands of rarely active features. The recipe was chosen on the training set.

    python benchmarks/quality.py --data train.csv --held-out test.csv
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import TrainerCallback, get_cosine_schedule_with_warmup

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from embedded import load_model_and_tokenizer, sae_folder, sae_layer
from published import Published, cached_arguments, pairs_of, report

from yapo_peft import YaPOConfig, YaPOTrainer


class Race(TrainerCallback):
    """After each step of ours, runs the published form's share of steps, and regularly evaluates ours."""

    def __init__(self, options: argparse.Namespace, trainer: YaPOTrainer, published: Published, batches: Any) -> None:
        self.options, self.trainer, self.published, self.batches = options, trainer, published, batches
        self.clock = {"ours": 0.0, "published": 0.0}
        self.history: list[dict[str, float]] = []
        self.taken = 0
        schedule = get_cosine_schedule_with_warmup
        self._schedule = schedule(published.optimizer, options.warmup, options.published_steps)
        self._random = random.Random(0)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Starts our clock."""
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops our clock, and lets the published form catch up."""
        self.clock["ours"] += time.perf_counter() - self._started
        self.catch_up(round(state.global_step / state.max_steps * self.options.published_steps))
        if state.global_step % self.options.evaluate_every == 0 or state.global_step == state.max_steps:
            loss = held_out_loss(self.trainer)
            self.history.append({"step": state.global_step, "seconds": self.clock["ours"], "held-out loss": loss})
            print(f"ours      step {state.global_step:4d}  {self.clock['ours']:6.0f} s  {loss:.4f}", flush=True)

    def catch_up(self, steps: int) -> None:
        """Trains the published form until it has taken `steps` steps."""
        with self.trainer.model.disable_adapter():
            while self.taken < steps:
                batch = next(self.batches)
                started = time.perf_counter()
                self.published.step(batch, self._random.choice((-1.0, 1.0)))
                self._schedule.step()
                self.clock["published"] += time.perf_counter() - started
                self.taken += 1


@torch.no_grad()
def held_out_loss(trainer: YaPOTrainer, code: Tensor | None = None) -> float:
    """Mean loss over both directions on the held-out pairs, with the trainer's code or a given one."""
    own = trainer._layers[0].yapo_code["default"]
    before = own.detach().clone()
    own.data.copy_(before if code is None else code)
    loss = trainer.evaluate()["eval_loss"]
    own.data.copy_(before)
    trainer.model.train()
    return loss


def batches_of(trainer: YaPOTrainer, dataset: Any) -> Any:
    """Yields shuffled batches of four pairs indefinitely."""
    order = random.Random(1)
    while True:
        indices = list(range(len(dataset)))
        order.shuffle(indices)
        for start in range(0, len(indices) - 3, 4):
            yield trainer._cache._batch([dataset[index] for index in indices[start : start + 4]])


def race(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Trains both forms, and compares their times."""
    model, tokenizer = load_model_and_tokenizer()
    published = Published(model, sae_layer(), sae_folder(), options.learning_rate)
    model = get_peft_model(model, YaPOConfig(layers=sae_layer(), sae_path=sae_folder()))
    train, test = pairs_of(options.data), pairs_of(options.held_out, "test")
    args = cached_arguments(
        folder,
        "activations",
        max_steps=options.steps,
        warmup_steps=options.warmup,
        learning_rate=options.own_learning_rate,
        adam_epsilon=options.own_epsilon,
        direction="example",
    )
    own = train.shuffle(seed=0).select(range(min(options.pairs, len(train))))
    started = time.perf_counter()
    YaPOTrainer(model, args, train_dataset=own, processing_class=tokenizer)
    build = time.perf_counter() - started
    held_out = test.select(range(options.held_out_pairs))
    trainer = YaPOTrainer(model, args, train_dataset=own, eval_dataset=held_out, processing_class=tokenizer)
    # The published form needs TRL's tokenized batches, but no cache.
    everything = trainer._prepare_dataset(train, tokenizer, args, "train")
    runner = Race(options, trainer, published, batches_of(trainer, everything))
    runner.clock["ours"] = build
    trainer.add_callback(runner)
    trainer.train()
    target = held_out_loss(trainer, published.code.detach())
    reached = next((point for point in runner.history if point["held-out loss"] <= target), None)
    seconds = runner.clock["published"]
    return {
        "published": {"steps": options.published_steps, "seconds": seconds, "held-out loss": target},
        "ours": {"seconds to build the cache": build, "history": runner.history},
        "seconds until ours reaches it": reached and reached["seconds"],
        "relative to the published time": reached and reached["seconds"] / seconds,
    }


def main() -> None:
    """Prints the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="CSV with question, matching, not_matching; defaults to an embedded set"
    )
    parser.add_argument("--held-out", type=Path, help="CSV to evaluate on")
    parser.add_argument("--held-out-pairs", type=int, default=200)
    parser.add_argument("--published-steps", type=int, default=150)
    parser.add_argument("--learning-rate", type=float, default=5e-2, help="learning rate of the published form")
    parser.add_argument("--steps", type=int, default=112, help="steps of ours, four pairs each")
    parser.add_argument("--pairs", type=int, default=450, help="pairs that ours caches and trains on")
    parser.add_argument("--own-learning-rate", type=float, default=0.3, help="learning rate of ours")
    parser.add_argument("--own-epsilon", type=float, default=3e-3, help="Adam epsilon of ours")
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--evaluate-every", type=int, default=14)
    parser.add_argument("--quick", action="store_true", help="a few steps on few pairs, as a smoke test")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if options.quick:
        options.published_steps, options.steps, options.pairs, options.held_out_pairs = 3, 3, 8, 4
    with tempfile.TemporaryDirectory() as folder:
        report({"quality": race(options, Path(folder))}, options.out)


if __name__ == "__main__":
    main()
