"""Adapters of chosen features."""

import pytest
import torch
from peft import get_peft_model
from tiny import make_model, make_sae, random_ids

from yapo_peft import ConfigError, YaPOConfig, steering
from yapo_peft.methods import set_features
from yapo_peft.tuner.adapters import steered_layers


def attach(**options):
    saes = [make_sae(seed=0), make_sae(seed=1)]
    return get_peft_model(make_model(), YaPOConfig(layers=[1, 2], sae=saes, **options)).eval(), saes


@pytest.mark.feature("Methods", "`set_features`, `yapo steer`: features that you choose, without data")
@torch.no_grad()
def test_multiplier_1_adds_the_value_to_the_activation_on_every_token():
    model, (sae, _) = attach()
    set_features(model, {1: {5: 8.0}})
    plain = make_model()
    shift = 8.0 * sae.W_dec[5]
    plain.model.layers[1].register_forward_hook(lambda module, args, output: output + shift)
    torch.testing.assert_close(model(random_ids()).logits, plain(random_ids()).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_below_0_a_feature_is_lowered_as_far_as_it_is_active():
    model, (sae, _) = attach()
    plain = make_model()
    hidden = []
    handle = plain.model.layers[1].register_forward_hook(lambda module, args, output: hidden.append(output))
    plain(random_ids())
    handle.remove()
    active = sae.encode(hidden[0])
    feature = int(active.sum((0, 1)).argmax())
    set_features(model, {1: {feature: -1e4}})
    taken = active[..., feature, None] * sae.W_dec[feature]
    plain.model.layers[1].register_forward_hook(lambda module, args, output: output - taken)
    torch.testing.assert_close(model(random_ids()).logits, plain(random_ids()).logits, rtol=1e-4, atol=1e-4)


def test_other_entries_stay_and_the_damage_is_forgotten():
    model, _ = attach()
    set_features(model, {1: {5: 8.0, 6: 1.0}, 2: {0: -1.0}})
    config = model.peft_config["default"]
    config.damage = {"plus": 0.1, "minus": 0.1}
    set_features(model, {1: {6: 0.0}})
    codes = [layer.code("default") for layer in steered_layers(model)]
    assert [code.nonzero().flatten().tolist() for code in codes] == [[5], [0]]
    assert config.damage is None


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({3: {0: 1.0}}, "steers layers 1, 2, not 3"),
        ({1: {0: 1.0, 96: 1.0}}, "Feature 96 of layer 1: its SAE has 96"),
        ({1: {-1: 1.0}}, "Feature -1 of layer 1"),
        ({1: {"0": 1.0}}, "Feature '0' of layer 1"),
        ({1: [0]}, "must be a mapping for each layer"),
        ({1: {0: 1.0}, 2: {0: float("nan")}}, "Feature 0 of layer 2 is set to nan"),
    ],
)
def test_what_is_not_there_is_named_and_nothing_changes(features, message):
    model, _ = attach()
    with pytest.raises(ConfigError, match=message):
        set_features(model, features)
    with steering(model, 1.0):
        assert torch.equal(model(random_ids()).logits, make_model()(random_ids()).logits)
    dense = get_peft_model(make_model(), YaPOConfig(layers=1, space="dense"))
    with pytest.raises(ConfigError, match="Setting features needs space='sae'"):
        set_features(dense, {1: {0: 1.0}})
