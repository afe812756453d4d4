"""Models, adapters and the transformers path, for tests beside vLLM's engine."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import inference_sae, make_sae, random_code
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from yapo_peft import YaPOConfig, set_multiplier
from yapo_peft.tuner.adapters import steered_layers

HAS_VLLM = find_spec("vllm") is not None
needs_vllm = pytest.mark.vllm

D_MODEL, VOCABULARY = 64, 128
# Heads as wide as vLLM's attention takes them.
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": D_MODEL,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**_SHAPE),
    "qwen2": lambda: Qwen2Config(**_SHAPE),
    "qwen3": lambda: Qwen3Config(**_SHAPE),
    # vLLM has no head of its own for it.
    "gemma2": lambda: Gemma2Config(
        **{**_SHAPE, "tie_word_embeddings": True}, query_pre_attn_scalar=32, sliding_window=16
    ),
    "gemma3": lambda: Gemma3TextConfig(**_SHAPE, query_pre_attn_scalar=32, sliding_window=16),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=D_MODEL, n_layer=4, n_head=2, n_positions=512,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
    ),
}  # fmt: skip
# One of each kind that a server tells apart, and one at two blocks.
ADAPTERS = {
    "both": {"layers": [1, 2]},
    "gated": {"layers": [2], "kind": "gated", "self_contained": True},
    "answers": {"layers": [2], "positions": "completion", "kind": "standard"},
    "last": {"layers": [1], "positions": "last"},
    "dense": {"layers": [2], "space": "dense"},
}

Steering = dict[str, float]


def save_model(architecture: str, folder: Path) -> Path:
    """A tiny model with random weights."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[architecture]()).float().eval()
    with torch.no_grad():
        # So that features fire, and answers depend on prompts.
        if model.config.tie_word_embeddings:
            model.get_input_embeddings().weight.mul_(5)
        else:
            model.get_input_embeddings().weight.mul_(50)
            model.get_output_embeddings().weight.mul_(5)
    model.save_pretrained(folder)
    return folder


def save_adapters(model_folder: Path, folder: Path) -> dict[str, str]:
    """The folder of each of `ADAPTERS`, by name."""
    found = {}
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        options = dict(options)
        kind, layers = options.pop("kind", "jumprelu"), options["layers"]
        if options.get("space") != "dense":
            options["sae_path"] = [str(folder / f"sae-{kind}-{layer}") for layer in layers]
            for layer, path in zip(layers, options["sae_path"], strict=True):
                inference_sae(make_sae(kind, d_in=D_MODEL, seed=layer), Path(path))
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), YaPOConfig(**options))
        for layer in steered_layers(model):
            code = layer.yapo_code["default"]
            code.data.copy_(random_code(d_sae=len(code), seed=10 * seed + layer.index, scale=2.0))
        model.save_pretrained(folder / name)
        found[name] = str(folder / name)
    return found


def load_all(model_folder: Path, adapters: dict[str, str]) -> PeftModel:
    """The model in transformers, with all adapters."""
    base = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    (first, source), *others = adapters.items()
    model = PeftModel.from_pretrained(base, source, first)
    for name, source in others:
        model.load_adapter(source, name)
    return model.eval()


@torch.no_grad()
def expected(model: PeftModel, prompt: list[int], answer: list[int], steering: Steering) -> torch.Tensor:
    """Log-probabilities of the tokens of an answer, `(n, vocabulary)`, as transformers steers."""
    ids = torch.tensor([prompt + answer])
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    if steering:
        model.base_model.set_adapter(list(steering))
        for name, multiplier in steering.items():
            set_multiplier(model, multiplier, name)
        logits = model(input_ids=ids, labels=labels, use_cache=False).logits
    else:
        with model.disable_adapter():
            logits = model(input_ids=ids, use_cache=False).logits
    return logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)


def assert_as_transformers(model, prompt, completion, steering, atol=1e-3) -> None:
    """A greedy answer of vLLM, with `logprobs=0`, is the one that transformers would give."""
    answer = list(completion.token_ids)
    wanted = expected(model, prompt, answer, steering)
    found = torch.tensor([step[token].logprob for token, step in zip(answer, completion.logprobs, strict=True)])
    own = wanted[range(len(answer)), answer]
    torch.testing.assert_close(found, own, atol=atol, rtol=1e-3)
    # Where two tokens are as likely, either is right.
    assert (own >= wanted.max(dim=-1).values - atol).all()
