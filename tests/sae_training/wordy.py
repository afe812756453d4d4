"""Texts of words, settings and activations for the tests of SAE training."""

import torch

from yapo_peft.sae_training import SAETrainingConfig
from yapo_peft.sae_training.activations import Activations
from yapo_peft.tuner.blocks import decoder_blocks

SETTINGS = {
    "d_sae": 64, "l0": 8, "tokens": 12_800, "batch_size": 128, "buffer": 2048, "learning_rate": 3e-3, "context": 16,
    "loss_tokens": 2000, "save_steps": 0,
}  # fmt: skip


def texts(count=200, seed=0):
    """Texts of words that are not equally frequent."""
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.rand(count, 30, generator=generator).square() * 100).long().tolist()
    return [" ".join(f"w{word}" for word in row) for row in drawn]


def configured(layers=1, **changes):
    return SAETrainingConfig(layers, **{**SETTINGS, **changes})


def outputs_of(model, layer, row):
    """A layer's output, `(seq, d_model)`, the plain way."""
    with torch.no_grad():
        return model(row[None].long(), output_hidden_states=True).hidden_states[layer + 1][0]


def prepared(model, tokenizer, config, found=None):
    """Activations of all text at the layers of a config."""
    rows = [torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int32) for text in found or texts(40)]
    blocks = {layer: decoder_blocks(model)[1][layer] for layer in config.layers}
    return Activations(model, blocks, rows, tokenizer, config)
