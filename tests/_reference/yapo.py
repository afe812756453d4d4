"""Forward and loss of arXiv 2601.08441, step by step, on top of sae-lens' own encoder and decoder."""

import torch
from torch import Tensor, nn


def published_forward(h: Tensor, code: Tensor, sae: nn.Module, multiplier: float) -> Tensor:
    """h' = Dec(ReLU(f + multiplier * v)) + (h - Dec(f)), with f = Enc(h), the output of the block detached."""
    h = h.detach()
    with torch.no_grad():
        f = sae.encode(h)
        reconstruction = sae.decode(f)
    error = h - reconstruction
    with torch.no_grad():
        sae.encode(h)  # layer_norm SAEs keep each token's statistics for exactly one decode
    return sae.decode(torch.relu(f + multiplier * code)) + error


def held_forward(h: Tensor, values: dict[int, float], sae: nn.Module, multiplier: float) -> Tensor:
    """The same for features that are held at values: f + multiplier * (value - f), not below 0."""
    h = h.detach()
    with torch.no_grad():
        f = sae.encode(h)
        reconstruction = sae.decode(f)
        held = f.clone()
        for feature, value in values.items():
            held[..., feature] = torch.relu(f[..., feature] + multiplier * (value - f[..., feature]))
        sae.encode(h)
        return sae.decode(held) + (h - reconstruction)


def steer_block(block: nn.Module, code: Tensor, sae: nn.Module, multiplier: float):
    """Hooks the published forward onto a block of an unwrapped model; returns the hook's handle."""

    def hook(module, args, output):
        if isinstance(output, tuple):
            return (published_forward(output[0], code, sae, multiplier), *output[1:])
        return published_forward(output, code, sae, multiplier)

    return block.register_forward_hook(hook)


def add_vector(block: nn.Module, vector: Tensor, multiplier: float):
    """Hooks the forward of BiPO (arXiv 2406.00045) onto a block: h' = h + multiplier * v; returns the hook's handle."""

    def hook(module, args, output):
        if isinstance(output, tuple):
            return (output[0].detach() + multiplier * vector, *output[1:])
        return output.detach() + multiplier * vector

    return block.register_forward_hook(hook)


def completion_logp(logits: Tensor, input_ids: Tensor, completion_mask: Tensor) -> Tensor:
    """Sum of the log-probabilities of the completion's tokens, (batch,), in float32."""
    logp = torch.log_softmax(logits[:, :-1].float(), dim=-1)
    token_logp = logp.gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    return (token_logp * completion_mask[:, 1:]).sum(-1)


def bidirectional_loss(
    logp_w: Tensor, logp_l: Tensor, ref_w: Tensor, ref_l: Tensor, direction: float | Tensor, beta: float
) -> Tensor:
    """-log sigmoid(d * beta * [(logp(y_w) - ref(y_w)) - (logp(y_l) - ref(y_l))]), the mean over the batch."""
    margin = (logp_w - ref_w) - (logp_l - ref_l)
    return -torch.log(torch.sigmoid(direction * beta * margin)).mean()
