"""Tiny models, SAEs, codes and data, made on the fly: offline and seeded."""

from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
)

from yapo_peft.tuner.hooks import REPEATS_HOOKS

D_MODEL, D_SAE, DEPTH, VOCABULARY = 32, 96, 4, 128
ARCHITECTURES = ("llama", "gemma2", "gemma3", "gpt2")
SAE_KINDS = ("standard", "jumprelu", "topk", "batchtopk", "gated")

# What transformers 5.20 renamed.
CHECKPOINTING = "gradient_checkpointing" if REPEATS_HOOKS else "activation_checkpointing"

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": D_MODEL,
    "intermediate_size": 64,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make_model(
    architecture: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, depth: int = DEPTH
) -> nn.Module:
    """A tiny causal language model with random weights, in eval mode."""
    torch.manual_seed(seed)
    shape = {**_SHAPE, "num_hidden_layers": depth}
    if architecture == "llama":
        config = LlamaConfig(**shape)
    elif architecture == "gemma2":
        config = Gemma2Config(**shape, query_pre_attn_scalar=8, sliding_window=16)
    elif architecture == "qwen3":
        config = Qwen3Config(**shape)
    elif architecture == "gemma3":
        config = Gemma3TextConfig(**shape, query_pre_attn_scalar=8, sliding_window=16)
    else:
        config = GPT2Config(
            vocab_size=VOCABULARY, n_embd=D_MODEL, n_layer=depth, n_head=4, n_positions=256,
            bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    # Random weights leave the residual stream tiny; scale the embeddings so that features fire.
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(50)
    return model


def make_attentive_model() -> nn.Module:
    """A model whose answers depend on what is far back."""
    model = make_model()
    model.get_input_embeddings().weight.data.div_(50)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.mul_(50)
    return model


def make_wrapper() -> nn.Module:
    """A tiny vision-language model, which `AutoModelForCausalLM` does not load."""
    text = {**_SHAPE, "model_type": "qwen2_5_vl_text"}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "hidden_size": D_MODEL, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": D_MODEL}
    ids = {"image_token_id": 120, "video_token_id": 121, "vision_start_token_id": 122, "vision_end_token_id": 123}
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids))
    return model.eval()


def make_sae(kind: str = "jumprelu", layer: int | None = None, d_in: int = D_MODEL, seed: int = 0, **overrides):
    """A random SAE of sae-lens, with about a quarter of its features on at a token."""
    from sae_lens import (
        BatchTopKTrainingSAE,
        BatchTopKTrainingSAEConfig,
        GatedSAE,
        GatedSAEConfig,
        JumpReLUSAE,
        JumpReLUSAEConfig,
        StandardSAE,
        StandardSAEConfig,
        TopKSAE,
        TopKSAEConfig,
    )

    torch.manual_seed(seed)
    cfg = {"d_in": d_in, "d_sae": D_SAE, **overrides}
    if kind == "standard":
        sae = StandardSAE(StandardSAEConfig(**cfg))
    elif kind == "jumprelu":
        sae = JumpReLUSAE(JumpReLUSAEConfig(**cfg))
        sae.threshold.data.uniform_(0.1, 0.8)
    elif kind == "topk":
        sae = TopKSAE(TopKSAEConfig(k=12, **cfg))
    elif kind == "batchtopk":
        sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(k=12, decoder_init_norm=1.0, **cfg))
        sae.topk_threshold.fill_(2.0)
    else:
        sae = GatedSAE(GatedSAEConfig(**cfg))
        sae.r_mag.data.normal_(std=0.1)
    for name, parameter in sae.named_parameters():
        if name.startswith("b_"):
            parameter.data.normal_(mean=-0.2 if name in ("b_enc", "b_gate") else 0.0, std=0.1)
    if layer is not None:
        sae.cfg.metadata.hook_name = f"blocks.{layer}.hook_resid_post"
    return sae


def inference_sae(sae, folder: Path):
    """The SAE as sae-lens saves it for inference: a BatchTopK one becomes a JumpReLU one."""
    from sae_lens import SAE, TrainingSAE

    if isinstance(sae, TrainingSAE):
        sae.save_inference_model(folder)
    else:
        sae.save_model(folder)
    return SAE.load_from_disk(folder)


def random_code(density: float = 0.5, d_sae: int = D_SAE, seed: int = 1, scale: float = 1.0) -> torch.Tensor:
    """A code with entries of both signs, a share of them zero."""
    generator = torch.Generator().manual_seed(seed)
    code = torch.randn(d_sae, generator=generator) * scale
    return code * (torch.rand(d_sae, generator=generator) < density)


def set_code(model: nn.Module, code: torch.Tensor, adapter_name: str = "default") -> None:
    """Writes a code into every steered layer that has the adapter; a dense one gets as much of it as it takes."""
    from yapo_peft.tuner.adapters import steered_layers

    for layer in steered_layers(model):
        if adapter_name in layer.yapo_code:
            own = layer.yapo_code[adapter_name]
            own.data.copy_(code[: len(own)])


def random_ids(batch: int = 2, seq: int = 9, seed: int = 0) -> torch.Tensor:
    """Token ids without special ones, (batch, seq)."""
    return torch.randint(3, VOCABULARY, (batch, seq), generator=torch.Generator().manual_seed(seed))


def preference_rows(count: int = 8, conversational: bool = True, seed: int = 0) -> list[dict]:
    """Pairs in which the chosen words are the even ones."""
    generator = torch.Generator().manual_seed(seed)

    def words(parity: int | None, number: int) -> str:
        drawn = torch.randint(0, 50, (number,), generator=generator).tolist()
        return " ".join(f"w{i if parity is None else 2 * i + parity}" for i in drawn)

    rows = []
    for i in range(count):
        row = {"prompt": words(None, 4 + i % 3), "chosen": words(0, 3 + i % 2), "rejected": words(1, 3)}
        if conversational:
            roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
            row = {name: [{"role": roles[name], "content": text}] for name, text in row.items()}
        rows.append(row)
    return rows


def trained_codes(trainer) -> torch.Tensor:
    """The codes of a trainer's model, (layers, d_sae)."""
    from yapo_peft.tuner.adapters import steered_layers

    return torch.stack([layer.yapo_code["default"].detach() for layer in steered_layers(trainer.model)])
