"""Makes the gallery: six adapters of the embedded model, scaled to the same damage, and a page that shows what they do.

python examples/gallery.py --out examples/gallery --page docs/gallery.md
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from demo import PROMPTS
from embedded import SETS, load_model_and_tokenizer, preferences, sae_folder, sae_layer
from generate import answers
from jinja2 import Environment, FileSystemLoader
from peft import get_peft_model

from yapo_peft import YaPOConfig, YaPOTrainer, YaPOTrainingConfig, calibrate, model_card, sweep
from yapo_peft.adapter_file.saving import save_adapter
from yapo_peft.interpret import explain
from yapo_peft.methods import fit_caa, measure_contrast

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
METHODS = {"yapo": "YaPO, 64 features", "bipo": "BiPO with a bound on the damage", "caa": "CAA"}
MULTIPLIERS = (-1.0, 0.0, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/gallery"), help="folder for the adapters")
    parser.add_argument("--page", type=Path, default=Path("out/gallery/README.md"), help="the page to write")
    parser.add_argument("--steps", type=int, default=40, help="training steps of 4 pairs")
    parser.add_argument("--pairs", type=int, help="pairs to read and to score; default: all")
    parser.add_argument("--max-kl", type=float, default=0.1, help="damage to scale to, in nats per token")
    options = parser.parse_args()
    entries = []
    for name in SETS:
        for method in METHODS:
            folder = options.out / f"{name}-{method}"
            entry = folder / "entry.json"
            if not entry.is_file():  # of a run that was interrupted
                found = make(name, method, folder, options)
                entry.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
            entries.append(json.loads(entry.read_text(encoding="utf-8")))
    options.page.parent.mkdir(parents=True, exist_ok=True)
    options.page.write_text(page(entries, options.max_kl), encoding="utf-8")
    print(f"Wrote {options.page}.")


def make(name: str, method: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Trains or fits an adapter, scales it, saves it with a card, and returns what the page shows of it."""
    print(f"{name}: {METHODS[method]}")
    model, tokenizer = load_model_and_tokenizer()
    torch.manual_seed(0)
    space = {"sae_path": sae_folder(), "self_contained": True} if method == "yapo" else {"space": "dense"}
    model = get_peft_model(model, YaPOConfig(layers=sae_layer(), task_type="CAUSAL_LM", **space))
    pairs, held_out = (preferences(name, split) for split in ("train", "test"))
    if options.pairs:
        pairs, held_out = pairs.select(range(options.pairs)), held_out.select(range(options.pairs))
    if method == "caa":
        fit_caa(model, measure_contrast(model, pairs, tokenizer))
    else:
        args = YaPOTrainingConfig(
            output_dir=str(options.out / "training"),
            max_steps=options.steps,
            max_features=64 if method == "yapo" else None,
            cache_activations=True,
            save_strategy="no",
            report_to="none",
            bf16=False,
            dataloader_pin_memory=False,
        )
        YaPOTrainer(model, args, train_dataset=pairs, processing_class=tokenizer).train()
    damage = calibrate(model, tokenizer, max_kl=options.max_kl)
    summary = sweep(model, held_out, tokenizer, MULTIPLIERS).gains("margin").summary()
    rows = {row.multiplier: row for row in summary.itertuples()}
    gains = [[getattr(rows[sign], f"gain{part}") for part in ("", "_low", "_high")] for sign in (-1.0, 1.0)]
    features: Any = explain(model, tokenizer=tokenizer, top=6, labels=False) if method == "yapo" else None
    prompt = PROMPTS[name][0]
    config = model.peft_config["default"]
    config.base_model_name_or_path = MODEL
    config.sae_path = ["examples/assets/sae"] if method == "yapo" else None
    shutil.rmtree(folder, ignore_errors=True)
    save_adapter(model, folder)
    metrics = {"margin gained at -1": round(gains[0][0], 2), "margin gained at +1": round(gains[1][0], 2)}
    training = {"dataset": f"{name} of examples/assets", "method": METHODS[method]}
    model_card(model, metrics=metrics, training=training, features=features).save(folder / "README.md")
    shutil.rmtree(options.out / "training", ignore_errors=True)
    return {
        "name": folder.name,
        "method": METHODS[method],
        "bytes": (folder / "adapter_model.safetensors").stat().st_size,
        "kl": damage,
        "gains": gains,
        "pairs": len(held_out),
        "features": None if features is None else [[int(row.feature), row.promotes] for row in features.itertuples()],
        "prompt": prompt,
        "answers": [[each, answers(model, tokenizer, [prompt], each)[0]] for each in MULTIPLIERS],
    }


def page(entries: list[dict[str, Any]], max_kl: float) -> str:
    """The page, in Markdown."""
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True)
    text = templates.get_template("gallery.md.jinja").render(entries=entries, max_kl=f"{max_kl:g}")
    return text.rstrip() + "\n"


if __name__ == "__main__":
    main()
