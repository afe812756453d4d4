import pytest
import torch
from _reference.yapo import published_forward, steer_block
from peft import get_peft_model
from tiny import (
    ARCHITECTURES,
    D_MODEL,
    D_SAE,
    SAE_KINDS,
    inference_sae,
    make_model,
    make_sae,
    random_code,
    random_ids,
    set_code,
)

from yapo_peft import YaPOConfig, steering
from yapo_peft.sae.loader import _extract
from yapo_peft.steering.formula import steering_shift

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


@pytest.mark.feature(
    "SAEs", "Standard, JumpReLU, TopK, BatchTopK and gated SAEs: values and gradients of the published forward"
)
@pytest.mark.parametrize("kind", SAE_KINDS)
@pytest.mark.parametrize("multiplier", [-2.0, -1.0, 0.5, 1.0])
@pytest.mark.parametrize("density", [0.0, 1 / D_SAE, 0.5, 1.0])
def test_values_and_gradients_equal_the_published_forward(kind, multiplier, density, tmp_path):
    sae = inference_sae(make_sae(kind), tmp_path)
    weights, _ = _extract(sae)
    h, weight_of_loss = torch.randn(2, 7, D_MODEL) * 3, torch.randn(2, 7, D_MODEL)

    ours = random_code(density).requires_grad_()
    shift, _ = steering_shift(h, ours, weights, multiplier)
    ((h + shift) * weight_of_loss).sum().backward()

    published = random_code(density).requires_grad_()
    expected = published_forward(h, published, sae, multiplier)
    (expected * weight_of_loss).sum().backward()

    torch.testing.assert_close(h + shift, expected.detach(), rtol=1e-5, atol=5e-5)
    torch.testing.assert_close(ours.grad, published.grad, rtol=1e-4, atol=1e-4)
    # Entries that are still zero learn from the tokens on which their feature is active.
    assert ours.grad[ours.detach() == 0].any() or density == 1.0
    with torch.no_grad():
        never_active = (sae.encode(h) == 0).all(dim=(0, 1))
    assert not ours.grad[never_active & (ours.detach() == 0)].any()


@pytest.mark.feature("SAEs", "Run-time normalisation `layer_norm` and `constant_norm_rescale`")
@pytest.mark.parametrize("normalization", ["layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("multiplier", [-1.0, 1.0])
def test_run_time_normalisation_equals_the_published_forward(normalization, multiplier):
    sae = make_sae("standard", normalize_activations=normalization)
    weights, _ = _extract(sae)
    h, code = torch.randn(2, 7, D_MODEL) * 3, random_code()
    shift, _ = steering_shift(h, code, weights, multiplier)
    torch.testing.assert_close(h + shift, published_forward(h, code, sae, multiplier), rtol=1e-4, atol=1e-4)


def test_one_multiplier_per_row_equals_row_by_row():
    weights, _ = _extract(make_sae())
    h, code = torch.randn(3, 4, D_MODEL), random_code()
    multipliers = torch.tensor([-1.0, 0.0, 2.0])
    together, _ = steering_shift(h, code, weights, multipliers)
    for row, multiplier in enumerate(multipliers.tolist()):
        alone, _ = steering_shift(h[row : row + 1], code, weights, multiplier)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-6)
    assert not together[1].any()


def test_a_feature_that_overflows_half_precision_leaves_no_nan():
    weights = _extract(make_sae("standard"))[0].to(torch.device("cpu"), torch.float16)
    h = torch.full((1, 1, D_MODEL), 60000.0, dtype=torch.float16) * weights.W_enc[:, 0].sign()
    assert weights.encode(h)[0].isinf().any()
    shift, _ = steering_shift(h, random_code(density=1.0).abs(), weights, 1.0)
    assert shift.isfinite().all()


@pytest.mark.feature(
    "transformers", "Llama, Gemma 2, Gemma 3 and GPT-2 layers in fp32, bf16 and fp16: logits of the published forward"
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("multiplier", [-1.0, 1.0])
def test_the_whole_model_equals_the_published_forward(architecture, dtype, multiplier):
    sae, code, ids, layer = make_sae(), random_code(), random_ids(), 2
    model = make_model(architecture, dtype)
    steered = get_peft_model(model, YaPOConfig(layers=layer, sae=sae))
    set_code(steered, code)
    with steering(steered, multiplier):
        output = steered(ids, output_hidden_states=True)

    reference = make_model(architecture, dtype)
    blocks = reference.transformer.h if architecture == "gpt2" else reference.model.layers
    steer_block(blocks[layer], code.to(dtype), sae.to(dtype=dtype), multiplier)
    expected = reference(ids, output_hidden_states=True)

    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype] * 10}
    torch.testing.assert_close(output.logits, expected.logits, **close)
    for index, (ours, theirs) in enumerate(zip(output.hidden_states, expected.hidden_states, strict=True)):
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 50, msg=f"{index}")
    # The states up to the steered block are untouched, the one it puts out is steered.
    untouched = make_model(architecture, dtype)(ids, output_hidden_states=True).hidden_states
    for index in range(layer + 1):
        assert torch.equal(output.hidden_states[index], untouched[index])
    assert not torch.equal(output.hidden_states[layer + 1], untouched[layer + 1])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_through_the_whole_model_equal_the_published_forward(architecture):
    sae, ids, layer = make_sae(), random_ids(), 1
    model = get_peft_model(make_model(architecture), YaPOConfig(layers=layer, sae=sae))
    set_code(model, random_code(0.3))
    model(ids).logits.logsumexp(-1).sum().backward()
    (name, ours), *others = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert name.endswith(f"{layer}.yapo.yapo_code.default")
    assert not others

    reference = make_model(architecture)
    published = random_code(0.3).requires_grad_()
    blocks = reference.transformer.h if architecture == "gpt2" else reference.model.layers
    steer_block(blocks[layer], published, sae, 1.0)
    reference(ids).logits.logsumexp(-1).sum().backward()
    torch.testing.assert_close(ours.grad, published.grad, rtol=1e-4, atol=1e-5 * float(published.grad.abs().max()))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_token_that_counts(architecture, side):
    model = get_peft_model(make_model(architecture), YaPOConfig(layers=2, sae=make_sae()))
    set_code(model, random_code())
    ids, padding = random_ids(1, 6), torch.zeros(1, 3, dtype=torch.long)
    padded = torch.cat([padding, ids] if side == "left" else [ids, padding], dim=1)
    mask = (padded != 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    alone = model(ids).logits
    beside = model(padded, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(beside[:, 3:] if side == "left" else beside[:, :6], alone, rtol=1e-4, atol=1e-4)
