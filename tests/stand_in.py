"""A small model in place of the embedded one, with activations that the embedded SAE can read, and few tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from embedded import SETS, model_folder, preferences, sae_folder, sae_layer
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM


def write_stand_in(cache: Path) -> None:
    """Writes the model where the examples look for the embedded one if XDG_CACHE_HOME is `cache`."""
    torch.manual_seed(0)
    texts = [message["content"] for name in SETS for row in preferences(name, "train") for message in row["chosen"]]
    tokenizer = AutoTokenizer.from_pretrained(model_folder()).train_new_from_iterator(texts, 2048)
    directions = load_file(Path(sae_folder()) / "sae_weights.safetensors")["W_dec"].float()
    d_sae, d_model = directions.shape
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=d_model, intermediate_size=32, num_hidden_layers=sae_layer() + 2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    features = torch.randint(d_sae, (len(tokenizer), 16))
    embeddings = nn.functional.embedding_bag(
        features, directions, mode="sum", per_sample_weights=torch.rand(features.shape) * 20
    )
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(embeddings)
        model.model.norm.weight.fill_(0.01)
    folder = cache / "yapo_peft" / model_folder().name
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
