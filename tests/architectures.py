"""Tiny random models of the architectures that people use, each with its mark for the table of docs/support.md."""

import pytest
import torch
import transformers
from tiny import D_MODEL, DEPTH, VOCABULARY
from transformers import AutoModelForCausalLM

_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SHAPE = {"vocab_size": VOCABULARY, "hidden_size": D_MODEL, "num_hidden_layers": DEPTH, "num_attention_heads": 4} | _IDS
_LLAMA = {**_SHAPE, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}
_SLIDING = {**_LLAMA, "sliding_window": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}  # fmt: skip
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
_VISION |= {"image_size": 28, "patch_size": 14}
_PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "global_head_dim": 8}

# Their config, its fields, and what the table says.
_ARCHITECTURES = {
    "qwen3": ("Qwen3Config", _LLAMA, "Qwen 3"),
    "qwen3_moe": ("Qwen3MoeConfig", {**_LLAMA, **_EXPERTS}, "Qwen 3 MoE"),
    "qwen3_next": (
        "Qwen3NextConfig",
        {**_LLAMA, **_EXPERTS, **_LINEAR, "shared_expert_intermediate_size": 32},
        "Qwen3-Next (linear attention in some layers, MoE)",
    ),
    "qwen3_5": ("Qwen3_5TextConfig", {**_LLAMA, **_LINEAR}, "Qwen 3.5 (linear attention in some layers)"),
    "gemma3": ("Gemma3TextConfig", _SLIDING, "Gemma 3"),
    "gemma4": ("Gemma4TextConfig", {**_SLIDING, **_PER_LAYER}, "Gemma 4 (embeddings for each layer)"),
    "gpt_oss": (
        "GptOssConfig",
        {**_SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
        "gpt-oss (MoE, attention sinks)",
    ),
    "llama4": (
        "Llama4TextConfig",
        {**_LLAMA, "intermediate_size_mlp": 64, "num_local_experts": 4, "attention_chunk_size": 16},
        "Llama 4 (MoE, attention in chunks)",
    ),
    "mixtral": ("MixtralConfig", {**_LLAMA, "num_local_experts": 4}, "Mixtral"),
    "olmo3": ("Olmo3Config", _SLIDING, "OLMo 3"),
    "phi3": ("Phi3Config", _LLAMA, "Phi-3 and Phi-4"),
    "smollm3": ("SmolLM3Config", _LLAMA, "SmolLM 3"),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **_SHAPE, "intermediate_size": 64, "num_key_value_heads": 4, "moe_intermediate_size": 32,
            "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "kv_lora_rank": 8,
            "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
        },
        "DeepSeek V3 (MoE, latent attention)",
    ),
    "lfm2": ("Lfm2Config", {**_LLAMA, "layer_types": ["conv", "full_attention"] * 2}, "LFM 2 (convolutions)"),
    "granite_hybrid": (
        "GraniteMoeHybridConfig",
        {
            **_SHAPE, **_MAMBA, "intermediate_size": 64, "num_key_value_heads": 2, "num_local_experts": 0,
            "shared_intermediate_size": 32, "layer_types": ["mamba", "attention"] * 2,
        },
        "Granite 4 (Mamba in some layers)",
    ),
    "mamba2": (
        "Mamba2Config",
        {
            "vocab_size": VOCABULARY, "hidden_size": D_MODEL, "num_hidden_layers": DEPTH, "num_heads": 8, "head_dim": 8,
            "state_size": 8, "n_groups": 2, "chunk_size": 16, **_IDS,
        },
        "Mamba 2, with positions='all'",
    ),
    "gemma3_vision": (
        "Gemma3Config",
        {
            "text_config": {**_SLIDING, "model_type": "gemma3_text"}, "mm_tokens_per_image": 4,
            "vision_config": {**_VISION, "model_type": "siglip_vision_model"}, "image_token_index": 120,
            "boi_token_index": 121, "eoi_token_index": 122,
        },
        "Gemma 3 with images",
    ),
    "llava": (
        "LlavaConfig",
        {
            "text_config": {**_LLAMA, "model_type": "llama"}, "image_token_index": 120,
            "vision_config": {**_VISION, "model_type": "clip_vision_model", "projection_dim": 32},
        },
        "Llava",
    ),
}  # fmt: skip

ARCHITECTURES = [
    pytest.param(name, marks=pytest.mark.feature("Architectures", text))
    for name, (_, _, text) in _ARCHITECTURES.items()
]


def make_architecture(name):
    """A tiny model with random weights, in eval mode."""
    kind, fields, _ = _ARCHITECTURES[name]
    if not hasattr(transformers, kind):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    config = getattr(transformers, kind)(**fields)
    torch.manual_seed(0)
    wrapper = {"gemma3_vision": "Gemma3ForConditionalGeneration", "llava": "LlavaForConditionalGeneration"}.get(name)
    model = getattr(transformers, wrapper)(config) if wrapper else AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20)
    return model.eval()


def prompt_of(name):
    """The arguments of a call: two prompts, with pictures for models that look at them."""
    torch.manual_seed(1)
    ids = torch.randint(5, 100, (2, 9))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "vision_config" in _ARCHITECTURES[name][1]:
        ids[:, 2:6] = 120
        given["pixel_values"] = torch.randn(2, 3, 28, 28)
        if name == "gemma3_vision":
            given["token_type_ids"] = (ids == 120).long()
    return given
