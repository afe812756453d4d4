"""Trains an adapter, by default with the embedded model, SAE and preference pairs.

python examples/train.py --out my-adapter
python examples/train.py --model google/gemma-2-2b-it --layers 15 --sae-release gemma-scope-2b-pt-res \
    --sae-id layer_15/width_65k/average_l0_68 --dataset pairs.csv --out polite-gemma
"""

from __future__ import annotations

import argparse

from embedded import SETS, load_model_and_tokenizer, preferences, sae_folder, sae_layer
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from yapo_peft import YaPOConfig, YaPOTrainer, YaPOTrainingConfig
from yapo_peft.data import load_pairs


def main() -> None:
    options = parse()
    model, tokenizer = load(options.model)
    if options.model is None:
        config = YaPOConfig(layers=sae_layer(), sae_path=sae_folder())
    else:
        config = YaPOConfig(
            layers=options.layers, sae_release=options.sae_release, sae_id=options.sae_id, sae_path=options.sae_path
        )
    if options.dataset in SETS:
        pairs, held_out = (preferences(options.dataset, split) for split in ("train", "test"))
    else:
        parts = load_pairs(options.dataset, chat=bool(tokenizer.chat_template)).train_test_split(0.1, seed=0)
        pairs, held_out = parts["train"], parts["test"]
    args = YaPOTrainingConfig(
        output_dir=options.out,
        num_train_epochs=options.epochs,
        cache_activations=True,  # run the layers below the steered one, and the reference, only once
        eval_strategy="epoch",
        logging_steps=5,
        save_strategy="no",
        report_to="none",
    )
    trainer = YaPOTrainer(
        get_peft_model(model, config), args, train_dataset=pairs, eval_dataset=held_out, processing_class=tokenizer
    )
    trainer.train()
    trainer.save_state()
    trainer.save_model()
    print(f"Saved the adapter to {options.out}. Try it: yapo generate {options.out} 'How are you?'")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or folder of a model; defaults to the embedded model")
    parser.add_argument("--layers", type=int, nargs="+", help="layers to steer")
    parser.add_argument("--sae-release")
    parser.add_argument("--sae-id", nargs="+")
    parser.add_argument("--sae-path", nargs="+")
    parser.add_argument("--dataset", default=SETS[0], help=f"{', '.join(SETS)}, or a file of preference pairs")
    parser.add_argument("--epochs", type=float, default=YaPOTrainingConfig.num_train_epochs)
    parser.add_argument("--out", required=True, help="folder to save the adapter to")
    return parser.parse_args()


def load(name: str | None):
    if name is None:
        return load_model_and_tokenizer()
    return AutoModelForCausalLM.from_pretrained(name, dtype="auto"), AutoTokenizer.from_pretrained(name)


if __name__ == "__main__":
    main()
