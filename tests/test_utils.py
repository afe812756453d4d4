"""Whoever looks at a model leaves each of its modules in the mode that it was in."""

import pytest
import torch
from peft import get_peft_model
from tiny import make_model, make_sae, random_code, set_code

from yapo_peft import YaPOConfig, sweep
from yapo_peft._utils import hash_model
from yapo_peft.interpret import attribute, explain
from yapo_peft.methods import measure_contrast


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize(
    "look",
    [
        sweep,
        measure_contrast,
        attribute,
        lambda model, pairs, tokenizer: explain(model, tokenizer=tokenizer, texts=pairs),
    ],
    ids=["sweep", "measure_contrast", "attribute", "explain"],
)
def test_modules_stay_in_the_mode_that_they_were_in(look, is_training, pairs, tokenizer):
    model = get_peft_model(make_model("gpt2").train(is_training), YaPOConfig(layers=2, sae=make_sae()))
    set_code(model, random_code())
    # What makes it necessary to look at each of them.
    assert model.training
    before = [module.training for module in model.modules()]
    assert is_training or not all(before)
    look(model, pairs, tokenizer)
    assert [module.training for module in model.modules()] == before


def test_sampled_hash_notices_a_code_that_differs_only_at_its_end():
    model = make_model()
    model.register_parameter("code", torch.nn.Parameter(torch.zeros(1 << 16)))
    before = hash_model(model, sampled=True)
    with torch.no_grad():
        model.code[-1] = 1.0
    assert hash_model(model, sampled=True) != before
