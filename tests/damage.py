"""Adapters on tiny models with sparse or dense codes, and their damage on some neutral text by whole forward passes."""

import torch
from peft import get_peft_model
from tiny import make_model, make_sae, random_code, set_code

from yapo_peft import YaPOConfig, steering

TEXT = ["w1 w5 w9 w2 w30 w31 w7 w8", "w3 w4 w60 w61 w62 w10", "w90 w80 w70 w11 w12"]
DENSE = {"space": "dense", "sae": None}


def make_adapter(architecture="llama", space="sae", **options):
    config = {"layers": 2, "space": space, **options}
    if space == "sae":
        config["sae"] = make_sae()
    model = get_peft_model(make_model(architecture), YaPOConfig(**config))
    set_code(model, random_code(d_sae=len(model.get_parameter(code_of(model))), scale=0.3))
    return model


def code_of(model):
    return codes_of(model)[0]


def codes_of(model):
    return [name for name, _ in model.named_parameters() if ".yapo_code." in name]


def slow_divergence(model, row, tokenizer, multiplier, adapter_name=None):
    """KL(unsteered || steered) by two whole forward passes."""
    ids = tokenizer(row, return_tensors="pt")["input_ids"]
    with torch.no_grad(), steering(model, 0.0, adapter_name):
        before = model(ids).logits[0].log_softmax(-1)
    with steering(model, multiplier, adapter_name):
        after = model(ids).logits[0].log_softmax(-1)
    return (before.exp() * (before - after)).sum(-1).mean()


def slow_damage(model, tokenizer, adapter_name=None):
    """The mean divergence over rows at multipliers +1 and -1, "plus" and "minus"."""
    damage = {}
    for side, sign in (("plus", 1.0), ("minus", -1.0)):
        rows = [slow_divergence(model, row, tokenizer, sign, adapter_name) for row in TEXT]
        damage[side] = float(torch.stack(rows).mean().detach())
    return damage
