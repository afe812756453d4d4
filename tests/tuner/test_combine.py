import pytest
import torch
from peft import get_peft_model
from peft.utils.merge_utils import ties
from tiny import D_SAE, make_model, make_sae, random_code, random_ids, set_code

from yapo_peft import ConfigError, SAEMismatchError, YaPOConfig, set_multiplier
from yapo_peft.tuner.adapters import steered_layers
from yapo_peft.tuner.combine import combine_codes

FIRST, SECOND = random_code(0.4, seed=1), random_code(0.4, seed=2)

pytestmark = pytest.mark.feature("PEFT", "`add_weighted_adapter`: linear, TIES, magnitude pruning")


@pytest.fixture
def model():
    model = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae())).eval()
    model.add_adapter("second", YaPOConfig(layers=2, sae=make_sae()))
    set_code(model, FIRST)
    set_code(model, SECOND, "second")
    return model


def code_of(model, name):
    return steered_layers(model)[0].yapo_code[name].detach()


def test_linear_is_the_weighted_sum_at_the_multipliers_of_now(model):
    set_multiplier(model, 2.0, "second")
    model.add_weighted_adapter(["default", "second"], [1.0, -0.5], "both")
    torch.testing.assert_close(code_of(model, "both"), FIRST - SECOND)
    assert not code_of(model, "both").requires_grad
    assert model.active_adapters == ["default"]


@torch.no_grad()
def test_the_combined_code_steers_once_and_saves_like_any_other(model, tmp_path):
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "both")
    model.set_adapter("both")
    once = model(random_ids()).logits
    model.base_model.set_adapter(["default", "second"])
    assert not torch.allclose(model(random_ids()).logits, once)  # a feature is cut once, not by each code
    direct = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae())).eval()
    set_code(direct, FIRST + SECOND)
    assert torch.equal(direct(random_ids()).logits, once)
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    loaded = type(model).from_pretrained(make_model(), tmp_path / "both")
    assert torch.equal(loaded(random_ids()).logits, once)


def test_pruning_keeps_the_largest_of_the_non_zero_entries():
    pruned = combine_codes([FIRST], [2.0], "magnitude_prune", density=0.25)
    kept = pruned.nonzero().squeeze(-1)
    assert len(kept) == int(0.25 * FIRST.count_nonzero())
    assert torch.equal(pruned[kept], 2 * FIRST[kept])
    assert pruned.abs()[kept].min() >= 2 * FIRST[pruned == 0].abs().max()


@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.5, 2.0]])
def test_ties_elects_and_averages_as_peft_does(method, weights):
    dense = [torch.randn(D_SAE), torch.randn(D_SAE), torch.randn(D_SAE)]
    weights = [*weights, 1.5]
    expected = ties(dense, torch.tensor(weights), density=0.5, majority_sign_method=method)
    torch.testing.assert_close(combine_codes(dense, weights, "ties", 0.5, method), expected)


def test_ties_with_a_negative_weight_elects_what_is_added():
    codes = [torch.tensor([1.0, 1.0, 0.0]), torch.tensor([2.0, -2.0, 3.0])]
    combined = combine_codes(codes, [1.0, -1.0], "ties", density=1.0)
    # Entry 0: +1 against -2, the latter is elected. Entry 1: +1 and +2 agree. Entry 2: only one has it.
    assert combined.tolist() == [-2.0, 1.5, -3.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"adapters": ["default", "nobody"]}, r"adapters=\['default', 'nobody'\]: choose some of 'default', 'second'"),
        ({"adapters": []}, r"adapters=\[\]"),
        ({"adapter_name": "second"}, "adapter_name='second' is taken"),
        ({"weights": [1.0]}, "has 1 values for 2 adapters"),
        ({"weights": [1.0, float("nan")]}, "must be a finite number"),
        ({"combination_type": "svd"}, "combination_type='svd': must be one of"),
        ({"density": 0.5}, "density=0.5 has no meaning for 'linear'"),
        ({"combination_type": "ties"}, "density=None: 'ties' needs a share"),
        ({"combination_type": "magnitude_prune", "density": 1.5}, "density=1.5"),
        ({"combination_type": "ties", "density": 0.5, "majority_sign_method": "all"}, "majority_sign_method='all'"),
    ],
)
def test_bad_arguments_are_named_and_leave_nothing_behind(model, arguments, message):
    good = {"adapters": ["default", "second"], "weights": [1.0, 1.0], "adapter_name": "both"}
    with pytest.raises(ConfigError, match=message):
        model.add_weighted_adapter(**good | arguments)
    assert list(model.peft_config) == ["default", "second"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 1}, r"'default' and 'third' steer layers \[2\] and \[1\]"),
        ({"sae": make_sae("gated", seed=5)}, "codes of different SAEs"),
        ({"positions": "last"}, "positions 'all' and 'last'"),
    ],
)
def test_adapters_that_have_nothing_in_common_are_refused(model, options, message):
    model.add_adapter("third", YaPOConfig(**{"layers": 2, "sae": make_sae()} | options))
    with pytest.raises(SAEMismatchError, match=message):
        model.add_weighted_adapter(["default", "third"], [1.0, 1.0], "both")
