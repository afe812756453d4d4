import contextlib

import numpy as np
import pytest
import torch
from peft import get_peft_model
from tiny import D_SAE, make_model, make_sae, random_code, random_ids, set_code

from yapo_peft import ConfigError, YaPOConfig, set_multiplier, steering
from yapo_peft.tuner.adapters import steered_layers


@pytest.fixture
def model():
    model = get_peft_model(make_model(), YaPOConfig(layers=1, sae=make_sae()))
    set_code(model, random_code())
    model.add_adapter("other", YaPOConfig(layers=3, sae=make_sae("standard", seed=2)))
    set_code(model, random_code(seed=9), "other")
    return model


def logits(model):
    with torch.no_grad():
        return model(random_ids()).logits


def test_negative_is_not_the_opposite_but_follows_the_sign(model):
    base = logits(make_model())
    with steering(model, 1.0):
        up = logits(model)
    with steering(model, -1.0):
        down = logits(model)
    assert not torch.equal(up, down)
    assert not torch.allclose(up - base, base - down)


def test_contexts_nest_and_restore_on_exceptions(model):
    at_one = logits(model)
    with steering(model, 2.0):
        at_two = logits(model)
        with contextlib.suppress(RuntimeError), steering(model, -1.0):
            assert not torch.equal(logits(model), at_two)
            raise RuntimeError("stop")
        assert torch.equal(logits(model), at_two)
    assert torch.equal(logits(model), at_one)


def test_another_adapter_steers_within_the_context_only(model):
    at_one = logits(model)
    with steering(model, 1.0, adapter_name="other"):
        inside = logits(model)
    assert torch.equal(logits(model), at_one)
    model.set_adapter("other")
    assert torch.equal(logits(model), inside)


def test_what_is_trainable_does_not_change(model):
    def trainable():
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    before = trainable()
    with steering(model, 1.0, adapter_name="other"):
        assert trainable() == before
    assert trainable() == before


def test_the_setter_lasts_and_reaches_inactive_adapters(model):
    set_multiplier(model, 0.0, "other")
    set_multiplier(model, -2.0)
    with steering(model, -2.0):
        expected = logits(model)
    assert torch.equal(logits(model), expected)
    model.set_adapter("other")
    assert torch.equal(logits(model), logits(make_model()))


def test_one_multiplier_per_row(model):
    multipliers = torch.tensor([-1.5, 2.0])
    with steering(model, multipliers):
        together = logits(model)
    for row, multiplier in enumerate(multipliers.tolist()):
        with steering(model, multiplier):
            torch.testing.assert_close(together[row], logits(model)[row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("multiplier", [np.float32(-1.5), np.int64(2), torch.tensor(0.5), 2])
def test_numbers_of_other_libraries_are_numbers(model, multiplier):
    with steering(model, float(multiplier)):
        expected = logits(model)
    with steering(model, multiplier):
        assert torch.equal(logits(model), expected)


def test_a_wrong_number_of_rows_is_named(model):
    with (
        pytest.raises(ConfigError, match="multiplier has 3 values for a batch of 2 rows"),
        steering(model, torch.ones(3)),
    ):
        logits(model)


@pytest.mark.parametrize(
    ("multiplier", "adapter_name", "message"),
    [
        (1.0, "nobody", "no YaPO adapter 'nobody'; the model has 'default', 'other'"),
        (float("inf"), None, "multiplier=inf: must be a finite number"),
        ("2", None, "multiplier='2': must be a finite number"),
        (torch.zeros(2, 2), None, "give one finite number per row"),
    ],
)
def test_bad_arguments_are_named(model, multiplier, adapter_name, message):
    with pytest.raises(ConfigError, match=message):
        set_multiplier(model, multiplier, adapter_name)
    with pytest.raises(ConfigError, match=message), steering(model, multiplier, adapter_name):
        pass


def test_a_model_without_adapter_is_refused():
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no YaPO adapter: attach one with"):
        set_multiplier(make_model(), 1.0)


def test_the_gradient_ends_at_the_lowest_layer_that_steers(model):
    assert [layer.is_lowest for layer in steered_layers(model)] == [True, False]
    with steering(model, 1.0, adapter_name="other"):
        assert [layer.is_lowest for layer in steered_layers(model)] == [True, True]
    assert [layer.is_lowest for layer in steered_layers(model)] == [True, False]
    assert set(code.numel() for layer in steered_layers(model) for code in layer.yapo_code.values()) == {D_SAE}


def test_a_list_has_one_multiplier_per_row(model):
    with torch.no_grad(), steering(model, [-1.0, 2.0]):
        listed = model(random_ids()).logits
    with torch.no_grad(), steering(model, torch.tensor([-1.0, 2.0])):
        assert torch.equal(model(random_ids()).logits, listed)
    with pytest.raises(ConfigError, match="multipliers="):
        model(random_ids(), multipliers=["a", "b"])
