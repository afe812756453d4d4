"""Training steps: the published form, ours on cached activations, and a dense vector on the same as a lower bound.

All three train in one process and take turns on the same batches, so that a change in the machine's speed affects all
of them alike. With --memory, each also trains in its own process to measure the peak memory of training steps.

    python benchmarks/training.py --data power-seeking.csv --features 4608 65536 --memory
    python benchmarks/training.py --quick
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from embedded import load_model_and_tokenizer, sae_folder, sae_layer
from published import Published, cached_arguments, pairs_of, random_sae, report

from yapo_peft import YaPOConfig, YaPOTrainer
from yapo_peft.scoring.lm_head import AnswerHead

SIDES = ("published", "ours", "dense")


class Sides(TrainerCallback):
    """After each step of ours, trains the other sides on the same batch."""

    def __init__(self, trainer: YaPOTrainer, published: Published | None, with_dense: bool) -> None:
        self.trainer, self.published = trainer, published
        self.seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        self.phases = {"read and pack": 0.0, "forward": 0.0, "backward": 0.0}
        self._dense = Dense(trainer) if with_dense else None
        self._batch: dict[str, Tensor] = {}
        self._elsewhere = False
        self._watch(trainer)

    def _watch(self, trainer: YaPOTrainer) -> None:
        """Records each batch, and times the phases of a step."""
        step, cache, accelerator = trainer.training_step, trainer._cache, trainer.accelerator

        def training_step(model: nn.Module, inputs: dict[str, Any], *args: Any) -> Tensor:
            self._batch = dict(inputs)
            return step(model, inputs, *args)

        trainer.training_step = training_step
        cache.pairs = self._timed("read and pack", cache.pairs)
        AnswerHead.packed = self._timed("forward", AnswerHead.packed)
        accelerator.backward = self._timed("backward", accelerator.backward)

    def _timed(self, phase: str, function: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **kwargs)
            if not self._elsewhere:
                self.phases[phase] += time.perf_counter() - started
            return result

        return timed

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Starts the first step's clock; later steps start when the previous one ends, to include reading the batch."""
        if not self.seconds["ours"]:
            self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops the clock, and trains the other sides."""
        self.seconds["ours"].append(time.perf_counter() - self._started)
        self._elsewhere = True
        direction = 1.0 if state.global_step % 2 else -1.0
        for side, other in (("published", self.published), ("dense", self._dense)):
            if other is not None:
                started = time.perf_counter()
                with self.trainer.model.disable_adapter():
                    other.step(self._batch, direction)
                self.seconds[side].append(time.perf_counter() - started)
        self._elsewhere = False
        self._started = time.perf_counter()


class Dense:
    """A vector added to the steered layer's output, trained on a trainer's cached activations and batches."""

    def __init__(self, trainer: YaPOTrainer) -> None:
        self._trainer = trainer
        self._layer = trainer._layers[0].block
        width = trainer.model.config.get_text_config().hidden_size
        self._vector = nn.Parameter(torch.zeros(width, device=trainer.accelerator.device))
        self._optimizer = torch.optim.AdamW([self._vector], lr=1e-2, weight_decay=0.0)

    def step(self, batch: dict[str, Tensor], direction: float, beta: float = 0.1) -> None:
        """Trains on a collated batch of cached pairs."""
        scorer = self._trainer._cache.pairs(self._trainer.model, batch)
        handle = self._layer.register_forward_hook(lambda module, args, output: output + direction * self._vector)
        try:
            log_probs = scorer(fused_lm_head=True).log_probs
        finally:
            handle.remove()
        chosen, rejected = (log_probs - scorer.unsteered).sum(dim=1).chunk(2)
        nn.functional.logsigmoid(direction * beta * (chosen - rejected)).mean().neg().backward()
        self._optimizer.step()
        self._optimizer.zero_grad()


def prepare(options: argparse.Namespace, features: int, side: str | None, folder: Path) -> tuple[YaPOTrainer, Sides]:
    """A trainer of ours on cached activations, with all other sides or only the given one."""
    dataset = pairs_of(options.data)
    dataset = dataset.select(range(min(options.pairs, len(dataset))))
    model, tokenizer = load_model_and_tokenizer()
    layer, sae = sae_layer(), sae_folder()
    if features != options.embedded:
        sae = str(folder / f"sae-{features}")
        if not Path(sae).is_dir():
            hidden = hidden_states(model, tokenizer, dataset, layer)
            random_sae(features, hidden, options.active, Path(sae))
    published = Published(model, layer, sae) if side in (None, "published") else None
    model = get_peft_model(model, YaPOConfig(layers=layer, sae_path=sae))
    schedule = {"max_steps": options.steps, "learning_rate": 2e-2, "warmup_steps": 5}
    args = cached_arguments(folder, f"activations-{features}", **schedule)
    trainer = YaPOTrainer(model, args, train_dataset=dataset, processing_class=tokenizer)
    sides = Sides(trainer, published, side in (None, "dense"))
    trainer.add_callback(sides)
    return trainer, sides


@torch.no_grad()
def hidden_states(model: nn.Module, tokenizer: Any, dataset: Any, layer: int) -> Tensor:
    """Outputs of a layer for some prompts, `(tokens, d_model)`, without the first token of each."""
    texts = [row["prompt"][0]["content"] for row in dataset.select(range(min(16, len(dataset))))]
    hidden = []
    for text in texts:
        outputs = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
        hidden.append(outputs.hidden_states[layer + 1][0, 1:])
    return torch.cat(hidden)


def throughput(options: argparse.Namespace, features: int, folder: Path) -> dict[str, Any]:
    """Seconds per step of each side, their ratios, and the time of each phase."""
    started = time.perf_counter()
    trainer, sides = prepare(options, features, None, folder)
    cached = time.perf_counter()
    again, _ = prepare(options, features, "ours", folder)
    build = (cached - started) - (time.perf_counter() - cached)
    del again
    trainer.train()
    seconds = {side: statistics.median(values[1:]) for side, values in sides.seconds.items()}
    pairs, steps = len(trainer.train_dataset), len(sides.seconds["ours"])
    epoch = {side: value * pairs / 4 for side, value in seconds.items()}
    published = sides.published
    assert published is not None
    rest = sum(sides.seconds["ours"]) - sum(sides.phases.values())
    return {
        "features": features,
        "active features per token": round(active_per_token(trainer), 1),
        "seconds per step": seconds,
        "pairs per second": {side: 4 / value for side, value in seconds.items()},
        "published / ours": seconds["published"] / seconds["ours"],
        "ours / dense": seconds["ours"] / seconds["dense"],
        "seconds to build the cache": build,
        "epochs until the cache pays off": build / (epoch["published"] - epoch["ours"]),
        "seconds per phase, published": {name: value / steps for name, value in published.seconds.items()},
        "seconds per phase, ours": {name: value / steps for name, value in sides.phases.items()}
        | {"rest": rest / steps},
    }


def active_per_token(trainer: YaPOTrainer) -> float:
    """Mean number of active features per token of the data."""
    store = next(iter(trainer._cache._cached.values())).store
    counts = store.read(list(range(min(16, len(trainer.train_dataset))))).count
    return float(counts.float().mean())


def peak_memory(options: argparse.Namespace, features: int, folder: Path) -> dict[str, Any]:
    """Peak memory of training steps in GB, each side in its own process."""
    peaks = {}
    for side in SIDES:
        command = [sys.executable, __file__, "--side", side, "--folder", str(folder), "--features", str(features)]
        command += ["--pairs", str(options.pairs), "--steps", "4"]
        command += ["--data", str(options.data)] if options.data else []
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        peaks[side] = json.loads(printed.splitlines()[-1])["peak"]
    return {"peak memory in GB": peaks, "memory, ours / published": peaks["ours"] / peaks["published"]}


def train_one_side(options: argparse.Namespace) -> None:
    """Trains a single side, and prints its peak memory."""
    trainer, sides = prepare(options, options.features[0], options.side, options.folder)
    batches = [
        trainer._prepare_inputs(batch) for _, batch in zip(range(4), trainer.get_train_dataloader(), strict=False)
    ]
    reset_peak()
    if options.side == "ours":
        trainer.train()
    else:
        other = sides.published if options.side == "published" else sides._dense
        with trainer.model.disable_adapter():
            for index, batch in enumerate(batches):
                other.step(batch, 1.0 if index % 2 else -1.0)
    print(json.dumps({"peak": peak()}))


def reset_peak() -> None:
    """Resets the peak memory counter."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """Peak memory in GB since `reset_peak`: GPU memory if there is a GPU, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def main() -> None:
    """Prints the results for each number of features as they arrive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="CSV with question, matching, not_matching; defaults to an embedded set"
    )
    parser.add_argument("--features", nargs="+", type=int, default=[4608, 65536], help="4608 is the embedded SAE")
    parser.add_argument("--active", type=int, default=70, help="active features per token in random SAEs")
    parser.add_argument("--pairs", type=int, default=160)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--memory", action="store_true", help="also measure peak memory")
    parser.add_argument("--quick", action="store_true", help="only the embedded SAE and a few steps, in under a minute")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.set_defaults(embedded=4608)
    options = parser.parse_args()
    if options.side:
        train_one_side(options)
        return
    if options.quick:
        options.features, options.pairs, options.steps = [4608], 12, 3
    with tempfile.TemporaryDirectory() as folder:
        results = []
        for features in options.features:
            results.append(throughput(options, features, Path(folder)))
            report({"training": results}, options.out)
            if options.memory:
                results[-1] |= peak_memory(options, features, Path(folder))
                report({"training": results}, options.out)


if __name__ == "__main__":
    main()
