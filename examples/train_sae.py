"""Trains a sparse autoencoder on a layer's output with sae-lens, and evaluates it on held-out text.

Works with any transformers model and any text. Trains a BatchTopK SAE and saves it for inference as a JumpReLU SAE in
sae-lens format, with its metrics in measures.json.

    python examples/train_sae.py --layer 14 --out runs/sae --text corpus.txt chats.jsonl:question:answer
    python examples/train_sae.py --model gpt2 --layer 6 --out runs/gpt2 --text hub:roneneldan/TinyStories:train:text
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from sae_data import Activations, cached_activations, spliced_loss, token_sequences
from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor


def main() -> None:
    options = parse()
    torch.manual_seed(options.seed)
    model, tokenizer = load(options.model)
    train, held_out = token_sequences(options.text, tokenizer, options.context, options.holdout, options.max_tokens)
    print(f"{sum(map(len, train)):,} training tokens, {sum(map(len, held_out)):,} held-out tokens")
    stores = [
        cached_activations(model, options.layer, part, options.cache, options.bf16, name)
        for part, name in ((train, "train"), (held_out, "held out"))
    ]
    sae = fit(stores[0], options)
    save(sae, options)
    sample = random.Random(options.seed).sample(held_out, len(held_out))
    sample = sample[
        : next((i for i, n in enumerate(accumulate(map(len, sample)), 1) if n >= options.loss_tokens), None)
    ]
    measures = measure(SAE.load_from_disk(options.out), model, options.layer, stores[1], sample)
    (options.out / "measures.json").write_text(json.dumps(measures, indent=2) + "\n")
    print(json.dumps(measures, indent=2))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="Hub id or folder of a model, or 'embedded'")
    parser.add_argument("--layer", type=int, required=True, help="index of the layer to train on")
    parser.add_argument("--text", nargs="+", required=True, help="text sources; see read_documents in sae_data.py")
    parser.add_argument("--out", type=Path, required=True, help="folder to save the SAE to")
    parser.add_argument("--cache", type=Path, default=Path("runs/activations"), help="folder for cached activations")
    parser.add_argument("--d-sae", type=int, default=4608, help="number of features")
    parser.add_argument("--k", type=float, default=32, help="average number of active features per token")
    parser.add_argument(
        "--samples", type=int, default=4_000_000, help="tokens to train on, repeated if there are fewer"
    )
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--context", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--holdout", type=float, default=0.05, help="share of each source to hold out for evaluation")
    parser.add_argument("--max-tokens", type=int, default=5_000_000, help="tokens to read from each source")
    parser.add_argument(
        "--loss-tokens", type=int, default=20_000, help="held-out tokens to evaluate the model's loss on"
    )
    parser.add_argument(
        "--dtype", default="float16", choices=["float32", "float16", "bfloat16"], help="dtype of the saved SAE"
    )
    parser.add_argument("--bf16", action="store_true", help="mixed precision: faster on CPUs with AMX")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def load(name: str) -> tuple[Any, Any]:
    if name == "embedded":
        from embedded import load_model_and_tokenizer

        model, tokenizer = load_model_and_tokenizer()
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    return model.eval(), tokenizer


def fit(store: Activations, options: argparse.Namespace) -> BatchTopKTrainingSAE:
    width = store.values.shape[1]
    sae = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(
            d_in=width,
            d_sae=options.d_sae,
            k=options.k,
            normalize_activations="expected_average_only_in",
            apply_b_dec_to_input=True,
            rescale_acts_by_decoder_norm=True,
        )
    )
    # With the decoder bias initialised to the mean, features only explain deviations from it, and fewer of them die.
    sample = store.rows(torch.randperm(len(store.kept))[:50_000])
    sae.b_dec.data = sample.mean(0) * (width**0.5 / sample.norm(dim=1).mean())
    steps = options.samples // options.batch
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=options.samples,
            train_batch_size_samples=options.batch,
            lr=options.learning_rate,
            lr_end=options.learning_rate / 10,
            lr_warm_up_steps=steps // 20,
            lr_decay_steps=steps // 4,
            autocast=options.bf16,
            dead_feature_window=100,
            n_batches_for_norm_estimate=50,
            n_checkpoints=3,
            checkpoint_path=str(options.out.with_name(f"{options.out.name}-checkpoints")),
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae,
        shuffled(store, options.batch, options.seed),
    )
    return trainer.fit()


def shuffled(store: Activations, batch: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        for indices in torch.randperm(len(store.kept), generator=generator).split(batch):
            if len(indices) == batch:
                yield store.rows(indices)


def save(sae: BatchTopKTrainingSAE, options: argparse.Namespace) -> None:
    """Saves the SAE for inference in the requested dtype, replacing the target folder only once it is complete."""
    sae.cfg.metadata.model_name = Path(options.model).name if options.model != "embedded" else "SmolLM2-135M-Instruct"
    sae.cfg.metadata.hook_name = f"blocks.{options.layer}.hook_resid_post"
    sae.cfg.metadata.context_size = options.context
    partial = options.out.with_name(f"{options.out.name}.partial")
    sae.save_inference_model(partial)
    SAE.load_from_disk(partial, dtype=options.dtype).save_model(partial)
    shutil.rmtree(options.out, ignore_errors=True)
    partial.rename(options.out)


@torch.no_grad()
def measure(sae: Any, model: Any, layer: int, store: Activations, sample: list[list[int]]) -> dict[str, float]:
    """Reconstruction metrics on held-out tokens, and the model's loss on a sample of them with the reconstruction
    spliced in.
    """
    sae = sae.to(dtype=torch.float32)
    fired, active, error, squares = torch.zeros(sae.cfg.d_sae), 0, 0.0, 0.0
    mean = torch.stack([store.rows(part).sum(0) for part in torch.arange(len(store.kept)).split(8192)]).sum(0)
    mean /= len(store.kept)
    for part in torch.arange(len(store.kept)).split(8192):
        rows = store.rows(part)
        features = sae.encode(rows)
        fired += (features > 0).sum(0)
        active += int((features > 0).sum())
        error += float((sae.decode(features) - rows).square().sum())
        squares += float((rows - mean).square().sum())
    clean = spliced_loss(model, layer, sample, store.limit, None)
    reconstructed = spliced_loss(model, layer, sample, store.limit, sae)
    zeroed = spliced_loss(model, layer, sample, store.limit, torch.zeros_like)
    averaged = spliced_loss(model, layer, sample, store.limit, lambda hidden: mean.expand_as(hidden))
    return {
        "held_out_tokens": len(store.kept),
        "loss_tokens": sum(map(len, sample)),
        "explained_variance": 1 - error / squares,
        "l0": active / len(store.kept),
        "dead_features": float((fired == 0).float().mean()),
        "loss": clean,
        "loss_with_reconstruction": reconstructed,
        "loss_recovered_from_zero": (zeroed - reconstructed) / (zeroed - clean),
        "loss_recovered_from_mean": (averaged - reconstructed) / (averaged - clean),
    }


if __name__ == "__main__":
    main()
