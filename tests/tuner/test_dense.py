"""A dense adapter: a plain vector, without an SAE, as BiPO and CAA have."""

import pytest
import torch
from _reference.yapo import add_vector
from peft import AutoPeftModelForCausalLM, get_peft_model
from safetensors.torch import load_file
from tiny import ARCHITECTURES, D_MODEL, make_model, make_sae, random_code, random_ids, set_code
from torch.testing import assert_close

from yapo_peft import SAEMismatchError, YaPOConfig, steering
from yapo_peft.adapter_file.card import model_card
from yapo_peft.tuner.adapters import steered_layers

FILE = "adapter_model.safetensors"
VECTOR = random_code(1.0, D_MODEL)


def dense_model(architecture="llama", dtype=torch.float32, **options):
    model = get_peft_model(make_model(architecture, dtype), YaPOConfig(**{"layers": 2, "space": "dense"} | options))
    set_code(model, VECTOR)
    return model.eval()


def blocks_of(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


@torch.no_grad()
@pytest.mark.feature("PEFT", '`space="dense"`: a plain vector as in BiPO and CAA, without an SAE')
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("multiplier", [1.0, -0.5])
def test_the_vector_is_added_to_every_token(architecture, dtype, multiplier):
    base = make_model(architecture, dtype)
    handle = add_vector(blocks_of(base)[2], VECTOR.to(dtype), multiplier)
    expected = base(random_ids()).logits
    handle.remove()
    model = dense_model(architecture, dtype)
    with steering(model, multiplier):
        found = model(random_ids()).logits
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]
    assert float((found - expected).float().norm() / expected.float().norm()) < tolerance


@torch.no_grad()
def test_multipliers_by_row_and_positions():
    model = dense_model(positions="completion")
    ids = random_ids(3)
    labels = ids.clone()
    labels[:, :5] = -100
    together = model(ids, labels=labels, multipliers=[1.0, 0.0, -2.0]).logits
    assert torch.equal(together[:, :5], make_model()(ids).logits[:, :5])
    for row, multiplier in enumerate((1.0, 0.0, -2.0)):
        with steering(model, multiplier):
            assert_close(model(ids, labels=labels).logits[row], together[row], rtol=1e-4, atol=1e-5)


def test_only_vectors_are_trained_and_nothing_below_them_gets_a_gradient():
    model = get_peft_model(make_model(), YaPOConfig(layers=[1, 3], space="dense"))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * D_MODEL
    below = model.get_base_model().model.layers[0].mlp.down_proj.weight.requires_grad_(True)
    model(random_ids(), labels=random_ids()).loss.backward()
    assert below.grad is None
    assert all(layer.yapo_code["default"].grad.norm() > 0 for layer in steered_layers(model))


@torch.no_grad()
def test_the_file_holds_the_vector_alone_and_loads_without_an_sae(tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    base = type(make_model()).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, YaPOConfig(layers=2, space="dense")).eval()
    set_code(model, VECTOR)
    model.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / FILE)
    assert {name.rpartition(".yapo.")[2]: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "yapo_code.values": (D_MODEL,),
        "yapo_code.digest": (32,),
    }
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(loaded(random_ids()).logits, model(random_ids()).logits)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "a vector that is added" in card
    assert not any(word in card for word in ("sae_lens", "sae-lens", "autoencoder", "parse"))


@torch.no_grad()
@pytest.mark.parametrize("multiplier", [1.0, -1.5])
def test_every_dense_adapter_can_be_merged(multiplier):
    model = dense_model("gpt2")
    with steering(model, multiplier):
        expected = model(random_ids()).logits
    steered_layers(model)[0].multiplier["default"] = multiplier
    merged = model.merge_and_unload()
    assert_close(merged(random_ids()).logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_dense_adapters_combine_with_each_other_and_stand_beside_sparse_ones():
    model = dense_model()
    model.add_adapter("sparse", YaPOConfig(layers=2, sae=make_sae()))
    model.add_adapter("second", YaPOConfig(layers=2, space="dense"))
    set_code(model, random_code(), "sparse")
    set_code(model, 2 * VECTOR, "second")
    model.base_model.add_weighted_adapter(["default", "second"], [1.0, -1.0], "difference")
    layer = steered_layers(model)[0]
    assert_close(layer.yapo_code["difference"].data, -VECTOR)
    with pytest.raises(SAEMismatchError, match="space 'dense' and 'sae'"):
        model.base_model.add_weighted_adapter(["default", "sparse"], [1.0, 1.0], "both")
    h = torch.randn(1, 4, D_MODEL)
    shifts = {}
    for name in ("default", "sparse"):
        model.set_adapter(name)
        shifts[name] = layer(h) - h
    model.base_model.set_adapter(["default", "sparse"])
    assert_close(layer(h) - h, shifts["default"] + shifts["sparse"], rtol=1e-4, atol=1e-5)


def test_the_card_names_layers_and_no_sae():
    text = str(model_card(dense_model(positions="last")))
    assert "Layers: 2. Tokens: `positions='last'`." in text
    assert "autoencoder" not in text
