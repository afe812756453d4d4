"""Effect against the number of features, chosen before training and pruned after it.

Trains a code of all features and prunes copies of it to fewer and fewer; then trains a code for each number, on the
same cached activations and with the same recipe. All are calibrated to the same damage at multipliers +1 and -1. A
code's effect is the change in the margin between chosen and rejected answers of held-out pairs from multiplier -1 to
+1; its damage is measured again, as the KL from the unsteered model on other neutral text.

It also prints what the linear model that chooses features predicts: the gain per square root of the damage, relative to
that of the best shift of all activations, which needs as many features as activations have dimensions.

    python benchmarks/sparsity.py --data train.csv --text neutral.txt --out sparsity.json --plot sparsity.png
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from embedded import load_model_and_tokenizer, sae_folder, sae_layer
from published import cached_arguments, pairs_of, report

from yapo_peft import YaPOConfig, YaPOTrainer, YaPOTrainingConfig, calibrate, sweep
from yapo_peft.evaluation import Damage
from yapo_peft.methods import prune
from yapo_peft.scoring.neutral import packaged_text
from yapo_peft.steering.formula import vector_of
from yapo_peft.trainer.config import PUBLISHED
from yapo_peft.trainer.selection import chosen_codes, measure_directions
from yapo_peft.trainer.units import trained_codes


def measure(
    trainer: YaPOTrainer, held_out: Any, text: list[str], neutral: Damage, calibration: list[Any]
) -> dict[str, float]:
    """Effect, damage and size of the trainer's current code, once calibrated."""
    model, tokenizer = trainer.model, trainer.processing_class
    calibrate(model, tokenizer, dataset=calibration)
    margins = sweep(model, held_out, tokenizer, (-1.0, 1.0), batch_size=16).summary()["margin"]
    damage = sweep(model, text, tokenizer, (-1.0, 1.0), measure=neutral, batch_size=4).summary()["kl"]
    code = trainer._layers[0].yapo_code["default"].detach()
    return {
        "features": int(code.count_nonzero()),
        "effect": float(margins[1] - margins[0]),
        "held-out loss": trainer.evaluate()["eval_loss"],
        "KL at -1": float(damage[0]),
        "KL at +1": float(damage[1]),
    }


def predicted(trainer: YaPOTrainer, numbers: list[int]) -> list[dict[str, float]]:
    """The share of the best shift's gain at equal damage that codes of few features have near zero."""
    given: Any = (trainer._text, trainer.train_dataset, trainer._gradients_of_shifts, trainer.args)
    trainer.model.train()
    layers = trained_codes(trainer._layers)
    decoders, gains, metric, active = measure_directions(layers, *given)
    found = []
    for features in numbers:
        code = chosen_codes(decoders, gains, metric, active, features, 0.1)[0]
        point: dict[str, float] = {"features": features}
        for sign, gain in zip((1, -1), gains, strict=True):
            shift = sign * vector_of(code, layers[0][0].yapo_sae["default"], sign)
            best = (gain @ metric.solve(gain)).sqrt()
            point[f"share at {sign:+d}"] = float(gain @ shift / metric.energies(shift).sqrt() / best)
        found.append(point)
    return found


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Trains, prunes and evaluates all codes."""
    pairs = pairs_of(options.data).shuffle(seed=0)
    train, held_out = pairs.select(range(options.pairs)), pairs.select(range(len(pairs) - options.held_out, len(pairs)))
    text = [options.text.read_text()] if options.text else held_out_text(held_out)
    neutral = Damage(options.block_size, options.blocks)
    known = packaged_text()[:4] if options.quick else packaged_text()
    results: dict[str, Any] = {"before training": [], "after training": []}

    def made(features: int | None) -> YaPOTrainer:
        model, tokenizer = load_model_and_tokenizer()
        model = get_peft_model(model, YaPOConfig(layers=sae_layer(), sae_path=sae_folder()))
        args = cached_arguments(
            folder,
            "activations",
            max_steps=options.steps,
            max_features=features,
            **{name: getattr(YaPOTrainingConfig, name) for name in PUBLISHED if name != "num_train_epochs"},
        )
        data = {"train_dataset": train, "eval_dataset": held_out, "neutral_dataset": known}
        return YaPOTrainer(model, args, processing_class=tokenizer, **data)

    def measured(trainer: YaPOTrainer) -> dict[str, float]:
        return measure(trainer, held_out, text, neutral, known)

    full = made(None)
    results["predicted"] = predicted(full, options.features)
    print(*results["predicted"], sep="\n", flush=True)
    if options.predict:
        return results
    full.train()
    code = full._layers[0].yapo_code["default"].detach().clone()
    results["all features"] = measured(full)
    print(results["all features"], flush=True)
    for features in options.features:
        full._layers[0].yapo_code["default"].data.copy_(code)
        prune(full.model, features)
        results["after training"].append(measured(full))
        trainer = made(features)
        trainer.train()
        results["before training"].append(measured(trainer))
        print(features, results["after training"][-1], results["before training"][-1], flush=True)
    return results


def held_out_text(pairs: Any) -> list[str]:
    """The questions of the pairs, in place of neutral text."""
    return [" ".join(message["content"] for message in pair["prompt"]) for pair in pairs]


def plot(results: dict[str, Any], path: Path) -> None:
    """Plots the effect against the number of features."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 3.7), layout="constrained")
    axes = figure.subplots()
    full = results["all features"]["effect"]
    labels = {
        "before training": ("#0072B2", "chosen before training"),
        "after training": ("#D55E00", "pruned after it"),
    }
    for name, (colour, label) in labels.items():
        line = sorted((point["features"], 100 * point["effect"] / full) for point in results[name])
        axes.plot(*zip(*line, strict=True), "o-", color=colour, label=label)
    axes.axhline(100, color="0.7", zorder=0)
    axes.axhline(95, color="0.85", linestyle=":", zorder=0)
    axes.set(
        xscale="log",
        xlabel="features",
        ylabel=f"effect, % of the effect with all {results['all features']['features']} features",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Prints the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="CSV with question, matching, not_matching; defaults to an embedded set"
    )
    parser.add_argument(
        "--text", type=Path, help="file of neutral text to measure the damage on; defaults to the held-out questions"
    )
    parser.add_argument("--features", nargs="+", type=int, default=[256, 64, 16], help="numbers of features")
    parser.add_argument("--pairs", type=int, default=450)
    parser.add_argument("--held-out", type=int, default=120, help="pairs of the same file to evaluate on")
    parser.add_argument("--blocks", type=int, default=24, help="blocks of text to measure the damage on")
    parser.add_argument("--block-size", type=int, default=256, help="tokens per block of text")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--predict", action="store_true", help="only print what the linear model predicts")
    parser.add_argument("--quick", action="store_true", help="a few steps, as a smoke test")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--plot", type=Path, help="file to write the plot to")
    options = parser.parse_args()
    if options.quick:
        options.pairs, options.held_out, options.steps, options.features = 8, 4, 3, [16]
        options.blocks, options.block_size = 1, 16
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        results = run(options, Path(folder))
    report({"sparsity": results}, options.out)
    if options.plot is not None and not options.predict:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
