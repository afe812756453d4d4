"""A steered model to evaluate."""

import pytest
from peft import get_peft_model
from tiny import make_model, make_sae, random_code, set_code

from yapo_peft import YaPOConfig


@pytest.fixture
def model():
    model = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae()))
    set_code(model, random_code(scale=2.0))
    return model
