"""What the plugin touches of vLLM's objects, where vLLM is not installed."""

from types import SimpleNamespace

import torch
from tiny import D_MODEL, DEPTH

from yapo_vllm import KEY


def model_config(d_model=D_MODEL, depth=DEPTH):
    return SimpleNamespace(
        get_hidden_size=lambda: d_model,
        hf_text_config=SimpleNamespace(num_hidden_layers=depth),
        dtype=torch.float32,
        runner_type="generate",
    )


def request(*numbers, id="r", tokens=(1, 2, 3), **asked):
    arguments = asked or ({KEY: [[number, 1.0] for number in numbers]} if numbers else None)
    return SimpleNamespace(
        request_id=id,
        req_id=id,
        client_index=0,
        sampling_params=SimpleNamespace(extra_args=arguments),
        prompt_token_ids=list(tokens),
        prompt_embeds=None,
        prompt_len=len(tokens),
        cache_salt=None,
    )
