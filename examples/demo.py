"""Trains a steering adapter on the embedded model in front of you, and shows what it does.

make demo
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from embedded import ASSETS, SETS, load_model_and_tokenizer, preferences, sae_folder, sae_layer
from generate import answers
from peft import get_peft_model
from rich.console import Console
from rich.table import Table

from yapo_peft import YaPOConfig, YaPOTrainer, YaPOTrainingConfig, plot_dose_response, sweep
from yapo_peft.evaluation import Damage
from yapo_peft.interpret import contexts, explain
from yapo_peft.scoring.neutral import packaged_text

PROMPTS = {
    "enthusiasm": [
        "How do I make a good cup of tea?",
        "What should I do on a rainy Sunday?",
        "Can you tell me about the city of Paris?",
    ],
    "caution": [
        "I have saved some money. Should I put all of it into one stock?",
        "A friend offers me a job at a startup. Should I quit mine?",
        "Should I hike alone in the mountains tomorrow?",
    ],
}
MULTIPLIERS = (-2.0, -1.0, 0.0, 1.0, 2.0)
SHOWN = (-1.0, 0.0, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--set", default="enthusiasm", choices=SETS, help="embedded preference set")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for the adapter and the plot")
    parser.add_argument("--steps", type=int, default=30, help="training steps of 4 pairs")
    parser.add_argument("--held-out", type=int, default=60, help="held-out pairs to score")
    parser.add_argument("--features", type=int, default=64, help="number of SAE features to steer")
    parser.add_argument("--quick", action="store_true", help="a step on a few pairs, as a smoke test")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.held_out = 1, 2
    console = Console()

    console.rule("1. A frozen chat model, and an adapter of one vector")
    model, tokenizer = load_model_and_tokenizer()
    config = YaPOConfig(layers=sae_layer(), sae_path=sae_folder(), task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    model.print_trainable_parameters()

    console.rule(f"2. Training on {4 * options.steps} pairs of the set '{options.set}'")
    started = time.monotonic()
    train(model, tokenizer, options)
    console.print(f"Trained in {time.monotonic() - started:.0f} seconds.")

    console.rule("3. Held-out preference and damage, from strongly against to strongly for")
    held_out = preferences(options.set, "test")
    held_out = held_out.select(range(min(options.held_out, len(held_out))))
    scores = sweep(model, held_out, tokenizer, MULTIPLIERS)
    (other,) = set(SETS) - {options.set}
    damage = sweep(model, answers_of(other), tokenizer, MULTIPLIERS, measure=Damage(128, 8))
    headings = ("multiplier", "chosen answer more likely", "mean margin (nats)", "95 % interval", "KL on other text")
    table = Table(*headings)
    for row, kl in zip(scores.summary().itertuples(), damage.summary()["kl"], strict=True):
        interval = f"{row.margin_low:+.1f} to {row.margin_high:+.1f}"
        shares = f"{100 * row.accuracy:.0f} %", f"{row.margin:+.1f}", interval, f"{kl:.3f}"
        table.add_row(f"{row.multiplier:+.1f}", *shares)
    console.print(table)
    title = f"Steering towards {options.set}"
    plot = plot_dose_response(scores, options.out / "dose-response.png", title, metrics=["accuracy", "margin"])
    console.print(f"Plot: {plot}")

    console.rule("4. The same questions at -1, 0 and +1")
    prompts = PROMPTS[options.set]
    shown = {multiplier: answers(model, tokenizer, prompts, multiplier) for multiplier in SHOWN}
    for index, prompt in enumerate(prompts):
        console.print(f"\n[bold]{prompt}[/bold]")
        for multiplier in SHOWN:
            console.print(f"  {multiplier:+.0f}  ", shown[multiplier][index], markup=False, highlight=False)

    console.rule("5. What it steers")
    show_features(model, tokenizer, console)

    console.rule("6. Saved, and loaded by another process")
    adapter = options.out / "adapter"
    save(model, adapter)
    file = adapter / "adapter_model.safetensors"
    console.print(f"{file}: {file.stat().st_size / 1024:.1f} KB")
    command = [sys.executable, str(Path(__file__).with_name("generate.py")), str(adapter), prompts[0]]
    printed = subprocess.run([*command, "--multipliers", "1"], capture_output=True, text=True, check=True).stdout
    again = printed.split("\n", 1)[1].strip()
    console.print(again, markup=False, highlight=False)
    if again != shown[1.0][0].strip():
        sys.exit("The loaded adapter answers differently: please report this.")
    console.print("The same answer, word for word.")
    test = os.path.relpath(ASSETS / "preferences" / options.set / "test.jsonl")
    console.print(f"\nA page about it: yapo report {adapter} --dataset {test}", soft_wrap=True)


def train(model, tokenizer, options: argparse.Namespace) -> None:
    args = YaPOTrainingConfig(
        output_dir=str(options.out),
        max_steps=options.steps,
        max_features=options.features,
        cache_activations=True,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        bf16=False,
        dataloader_pin_memory=False,
    )
    train_dataset, neutral = preferences(options.set, "train"), packaged_text()[:48]
    train_dataset = train_dataset.select(range(min(4 * options.steps, len(train_dataset))))
    if options.quick:
        neutral = neutral[:2]
    data = {"train_dataset": train_dataset, "neutral_dataset": neutral}
    trainer = YaPOTrainer(model, args, processing_class=tokenizer, **data)
    trainer.train()
    trainer.save_state()  # for the losses in a report


def answers_of(name: str) -> list[str]:
    """Held-out chosen answers of a preference set."""
    return [answer[0]["content"] for answer in preferences(name, "test")["chosen"]]


def show_features(model, tokenizer, console: Console) -> None:
    features = explain(model, tokenizer=tokenizer, top=None, tokens=4, labels=False)
    console.print(f"{len(features)} features have an entry. Those with the largest effect, and a passage of each:")
    features = features.head(6)
    texts = [text for name in SETS for text in answers_of(name)]
    passages = contexts(model, features["feature"].tolist(), texts, tokenizer, top=1, window=8).set_index("feature")
    table = Table("feature", "entry", "promotes", "passage where it is most active")
    for row in features.itertuples():
        passage = "".join(passages.loc[row.feature, "tokens"]) if row.feature in passages.index else "none found"
        table.add_row(str(row.feature), f"{row.value:+.2f}", " ".join(row.promotes), passage.replace("\n", " "))
    console.print(table)


def save(model, folder: Path) -> None:
    """Saves beside the target and renames, so that a failure leaves the last adapter alone."""
    partial = folder.with_name(f"{folder.name}.partial")
    model.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


if __name__ == "__main__":
    main()
