"""CAA (arXiv 2312.06681) and SAS (arXiv 2503.00177), one answer at a time."""

import torch
from torch import Tensor


def answers_read(model, sae, rows, tokenizer, layer, tokens):
    """Activations and features of each chosen and rejected answer, `(2, answers, d_model)`, `(2, answers, d_sae)`."""
    hidden, features = ([], []), ([], [])
    for row in rows:
        for kind, answer in enumerate(("chosen", "rejected")):
            rendered = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
            whole = tokenizer.apply_chat_template(row["prompt"] + row[answer], tokenize=False)
            start, ids = len(tokenizer(rendered)["input_ids"]), tokenizer(whole)["input_ids"]
            end = ids.index(tokenizer.eos_token_id, start)
            with torch.no_grad():
                h = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer + 1][0]
            h = h[start:end] if tokens == "completion" else h[end - 1 : end]
            hidden[kind].append(h.mean(dim=0))
            features[kind].append(sae.encode(h).detach().mean(dim=0))
    return tuple(torch.stack([torch.stack(kind) for kind in kinds]) for kinds in (hidden, features))


def caa_vector(hidden: Tensor) -> Tensor:
    """The mean difference, `(d_model,)`."""
    return (hidden[0] - hidden[1]).mean(dim=0)


def sas_vector(features: Tensor, tau: float) -> Tensor:
    """Keep what is often on, drop what both sides keep, subtract the means where it is on, `(d_sae,)`."""
    result = torch.zeros(features.shape[-1])
    for feature in range(features.shape[-1]):
        means = []
        for values in features[:, :, feature]:
            on = values[values > 0]
            means.append(float(on.mean()) if len(on) and len(on) / len(values) >= tau else 0.0)
        if (means[0] == 0) != (means[1] == 0):
            result[feature] = means[0] - means[1]
    return result
