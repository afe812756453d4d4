"""The ways that steering is computed, against the published forward: values and gradients."""

from functools import cache
from tempfile import TemporaryDirectory

import pytest
import torch
from _reference.yapo import published_forward
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from tiny import D_MODEL, D_SAE, SAE_KINDS, inference_sae, make_model, make_sae, random_ids, set_code
from torch import nn
from torch.testing import assert_close

from yapo_peft import YaPOConfig, set_multiplier, steering
from yapo_peft.sae import load_sae, register_sae
from yapo_peft.steering.folded import FoldedSteering
from yapo_peft.steering.formula import steering_shift
from yapo_peft.steering.learning import ActiveFeatures, sparse_shift
from yapo_peft.tuner.adapters import steered_layers
from yapo_peft.tuner.call import Call
from yapo_peft.tuner.layer import YaPOLayer

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
NORMALIZATIONS = ("none", "layer_norm", "constant_norm_rescale")
MANY = settings(max_examples=40, deadline=None, derandomize=True)


@cache
def sae_of(kind, normalization):
    options = {} if kind == "batchtopk" else {"normalize_activations": normalization}
    with TemporaryDirectory() as folder:
        return inference_sae(make_sae(kind, **options), folder)


@st.composite
def cases(draw):
    """An SAE, activations, a code with some non-zero entries, and a multiplier."""
    sae = sae_of(draw(st.sampled_from(SAE_KINDS)), draw(st.sampled_from(NORMALIZATIONS)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, seq = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    h = torch.randn(batch, seq, D_MODEL, generator=generator) * draw(st.sampled_from([0.3, 3.0]))
    code = torch.zeros(D_SAE)
    entries = torch.randperm(D_SAE, generator=generator)[: draw(st.sampled_from([0, 1, 64, D_SAE]))]
    code[entries] = torch.randn(len(entries), generator=generator) * draw(st.sampled_from([0.1, 1.0]))
    code = draw(st.sampled_from([code, code.abs(), -code.abs()]))
    return sae, h, code, draw(st.sampled_from([-2.0, -1.0, -0.3, 0.5, 1.0, 2.0]))


@pytest.mark.parametrize("dtype", TOLERANCE)
@MANY
@given(cases())
def test_a_folded_code_steers_as_published(dtype, case):
    sae, h, code, multiplier = case
    frozen, h = load_sae(content_hash=register_sae(sae)), h.to(dtype)
    shift, moved = FoldedSteering.of(code, frozen, multiplier, h, None).shift(h, multiplier, track=True)
    expected = published_forward(h.float(), code, sae, multiplier).detach()
    # Rounding can turn a feature on or off at its threshold; such tokens have no one right answer.
    features = frozen.weights(CPU, dtype).encode(h)[0]
    agree = ((features > 0) == (sae.encode(h.float()) > 0)).all(dim=-1)
    tolerance = TOLERANCE[dtype]
    scale = float(expected.abs().max())
    assert_close((h + shift).float()[agree], expected[agree], rtol=tolerance, atol=tolerance * scale)
    assert agree.all() or dtype != torch.float32
    _, steps = steering_shift(h, code, frozen.weights(CPU, dtype), multiplier)
    assert torch.equal(moved, steps.ne(0).any(dim=-1))


@MANY
@given(cases())
def test_a_code_learns_as_published(case):
    sae, h, code, multiplier = case
    weights = load_sae(content_hash=register_sae(sae)).weights(CPU, torch.float32)
    weight_of_loss = torch.randn(h.shape, generator=torch.Generator().manual_seed(0))
    ours, published = code.clone().requires_grad_(), code.clone().requires_grad_()
    shift, moved = sparse_shift(h, ours, weights.W_dec, multiplier, ActiveFeatures.of(h, weights))
    ((h + shift) * weight_of_loss).sum().backward()
    expected = published_forward(h, published, sae, multiplier)
    (expected * weight_of_loss).sum().backward()
    assert_close(h + shift, expected, rtol=1e-5, atol=1e-5 * float(expected.detach().abs().max()))
    assert_close(ours.grad, published.grad, rtol=1e-5, atol=1e-5 * max(1.0, float(published.grad.abs().max())))
    assert torch.equal(ours.grad == 0, published.grad == 0)
    assert torch.equal(moved, steering_shift(h, code, weights, multiplier)[1].ne(0).any(dim=-1))


@MANY
@given(cases())
def test_rows_of_different_multipliers_learn_as_one_by_one(case):
    sae, h, code, multiplier = case
    weights = load_sae(content_hash=register_sae(sae)).weights(CPU, torch.float32)
    multipliers = torch.tensor([multiplier, 0.0, -multiplier])[: len(h)]
    together = code.clone().requires_grad_()
    shift, _ = sparse_shift(h, together, weights.W_dec, multipliers, ActiveFeatures.of(h, weights))
    shift.square().sum().backward()
    alone = code.clone().requires_grad_()
    shifts = [steering_shift(h[i : i + 1], alone, weights, s)[0] for i, s in enumerate(multipliers.tolist())]
    torch.cat(shifts).square().sum().backward()
    assert_close(shift, torch.cat(shifts), rtol=1e-5, atol=1e-5)
    assert_close(together.grad, alone.grad, rtol=1e-4, atol=1e-5 * max(1.0, float(alone.grad.abs().max())))


@MANY
@given(cases())
def test_the_gradient_of_the_activations_of_an_upper_layer_is_the_general_one(case):
    sae, h, code, multiplier = case
    call = Call(nn.Identity())
    for index in (0, 1):
        layer = YaPOLayer(nn.Identity(), index, call)
        layer.update_layer("default", YaPOConfig(layers=index, sae=sae, multiplier=multiplier), D_SAE)
        layer.yapo_sae["default"] = load_sae(content_hash=register_sae(sae))
        layer.set_adapter("default")
    layer.yapo_code["default"].data = code
    weight_of_loss = torch.randn(h.shape, generator=torch.Generator().manual_seed(0))
    below = h.clone().requires_grad_()
    steered = layer(below)
    (steered * weight_of_loss).sum().backward()
    other, learned = h.clone().requires_grad_(), code.clone().requires_grad_()
    weights = layer.yapo_sae["default"].weights(CPU, torch.float32)
    expected = other + steering_shift(other, learned, weights, multiplier)[0]
    (expected * weight_of_loss).sum().backward()
    for ours, theirs in (
        (steered, expected),
        (below.grad, other.grad),
        (layer.yapo_code["default"].grad, learned.grad),
    ):
        assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * max(1.0, float(theirs.detach().abs().max())))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_infinite_entry_of_the_other_sign_stays_finite(sign):
    weights = load_sae(content_hash=register_sae(make_sae("standard"))).weights(CPU, torch.float32)
    h, code = torch.randn(1, 3, D_MODEL), torch.zeros(D_SAE)
    code[3] = -sign * float("inf")
    shift, _ = sparse_shift(h, code.requires_grad_(), weights.W_dec, sign, ActiveFeatures.of(h, weights))
    assert_close(shift, steering_shift(h, code, weights, sign)[0])
    assert shift.isfinite().all()


def test_an_empty_batch_is_steered(model):
    assert steered_layers(model.train())[0](torch.zeros(0, 5, D_MODEL)).shape == (0, 5, D_MODEL)


@pytest.fixture
def model():
    model = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae())).eval()
    set_code(model, torch.randn(D_SAE))
    return model


def logits(model, **options):
    with torch.no_grad():
        return model(random_ids(), **options).logits


CHANGES = {
    "code": lambda model: set_code(model, torch.randn(D_SAE)),
    "code in place": lambda model: steered_layers(model)[0].yapo_code["default"].data.add_(1.0),
    "code through other memory": lambda model: steered_layers(model)[0].yapo_code["default"].detach().numpy().fill(0.5),
    "multiplier": lambda model: set_multiplier(model, -0.7),
    "dtype": lambda model: model.to(torch.bfloat16),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_folded_is_folded_anew_when_it_changes(model, change):
    before = logits(model)
    (layer,) = steered_layers(model)
    folded = layer._folded["default"]
    assert torch.equal(logits(model), before)
    assert layer._folded["default"] is folded
    CHANGES[change](model)
    after = logits(model)
    layer._folded.clear()
    assert torch.equal(logits(model), after)
    assert not torch.equal(after, before)


def test_within_generate_nothing_is_folded_twice(model, monkeypatch):
    calls = []
    of = FoldedSteering.of
    monkeypatch.setattr(FoldedSteering, "of", lambda *args: calls.append(1) or of(*args))
    compared = []
    equal = torch.equal
    monkeypatch.setattr(torch, "equal", lambda *args: compared.append(1) or equal(*args))
    model.generate(random_ids(), max_new_tokens=6, do_sample=False, eos_token_id=None)
    model.generate(random_ids(), max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert (len(calls), len(compared)) == (1, 1)


def test_what_is_folded_in_inference_mode_serves_outside_it(model):
    with torch.inference_mode():
        inside = model(random_ids()).logits.clone()
    embeddings = model.get_input_embeddings()(random_ids()).detach().requires_grad_()
    model.set_adapter("default", inference_mode=True)
    assert_close(model(inputs_embeds=embeddings).logits, inside)


def test_what_is_folded_under_autocast_is_exact_outside_it(model):
    ids = random_ids()
    with torch.no_grad():
        expected = model(ids).logits
        set_multiplier(model, -2.0)  # so that it is folded anew
        model(ids)
        set_multiplier(model, 1.0)
        with torch.autocast("cpu", torch.bfloat16):
            model(ids)
        assert torch.equal(model(ids).logits, expected)


def test_a_code_learns_in_float32_under_autocast():
    sae = sae_of("jumprelu", "none")
    weights = load_sae(content_hash=register_sae(sae)).weights(CPU, torch.float32)
    h, code = torch.randn(2, 5, D_MODEL), torch.randn(D_SAE)
    active = ActiveFeatures.of(h, weights)
    expected = sparse_shift(h, code, weights.W_dec, 1.0, active)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sparse_shift(h, code, weights.W_dec, 1.0, active)[0], expected)


def test_copies_do_not_carry_what_is_folded(model):
    import copy

    logits(model)
    (layer,) = steered_layers(copy.deepcopy(model))
    assert not layer._folded
    assert steered_layers(model)[0]._folded


def test_without_a_gradient_the_autoencoder_is_not_copied_whole(model):
    frozen = steered_layers(model)[0].yapo_sae["default"]
    frozen._copies.clear()
    logits(model)
    with steering(model, torch.tensor([-1.0, 1.0])):
        logits(model)
    model.generate(random_ids(), max_new_tokens=2)
    assert not frozen._copies
