import json

import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from tiny import ARCHITECTURES, D_SAE, VOCABULARY, make_model, make_sae, random_code, random_ids, set_code

from yapo_peft import AdapterFileError, SAEMismatchError, UnsupportedOperationError, YaPOConfig, steering
from yapo_peft.tuner.adapters import steered_layers

FILE = "adapter_model.safetensors"


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return request.param


def steered_model(architecture="llama", dtype=torch.float32, density=0.5, **options):
    options = {"layers": 2, "sae": make_sae()} | options
    model = get_peft_model(make_model(architecture, dtype), YaPOConfig(**options))
    if density:
        set_code(model, random_code(density))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_zero_code_a_zero_multiplier_and_a_disabled_adapter_change_no_bit(architecture, dtype):
    ids = random_ids()
    base = make_model(architecture, dtype)(ids).logits
    model = steered_model(architecture, dtype, density=0)
    assert torch.equal(model(ids).logits, base)
    set_code(model, random_code())
    assert not torch.equal(model(ids).logits, base)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, base)
    with steering(model, 0):
        assert torch.equal(model(ids).logits, base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_stay_in_float32(dtype):
    model = steered_model(dtype=dtype)
    code = steered_layers(model)[0].yapo_code["default"]
    before = code.detach().clone()
    assert code.dtype == torch.float32
    model.to(dtype)
    assert torch.equal(steered_layers(model)[0].yapo_code["default"], before)


def test_only_codes_are_parameters_of_the_adapter():
    model = steered_model(layers=[0, 3], sae=[make_sae(), make_sae()])
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable == [f"base_model.model.model.layers.{i}.yapo.yapo_code.default" for i in (0, 3)]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * D_SAE
    names = set(model.state_dict()) - set(trainable)
    assert {name.replace("base_model.model.", "").replace(".base_layer", "") for name in names} == set(
        make_model().state_dict()
    )


def test_two_adapters_share_one_sae():
    model = steered_model()
    model.add_adapter("second", YaPOConfig(layers=2, sae=make_sae()))
    (layer,) = steered_layers(model)
    assert layer.yapo_sae["default"] is layer.yapo_sae["second"]


@torch.no_grad()
def test_save_and_load_keep_every_bit(architecture, tmp_path):
    ids, model = random_ids(), steered_model(architecture, density=0.3)
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}):
        loaded = PeftModel.from_pretrained(make_model(architecture), tmp_path, **options)
        assert torch.equal(loaded(ids).logits, expected)


def test_random_initialisation_is_small_and_not_zero():
    code = steered_layers(steered_model(density=0, init_weights=False))[0].yapo_code["default"]
    assert 0 < code.abs().max() < 0.2


@torch.no_grad()
def test_the_multiplier_of_the_config_is_the_multiplier_at_load_time(tmp_path):
    ids, model = random_ids(), steered_model()
    with steering(model, -1.5):
        expected = model(ids).logits
    model.peft_config["default"].multiplier = -1.5
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(make_model(), tmp_path)(ids).logits, expected)


def test_the_file_holds_indices_values_and_the_saes_hash_only(tmp_path):
    sae = make_sae()
    sae_wide = type(sae)(type(sae.cfg)(d_in=32, d_sae=4608))
    model = get_peft_model(make_model(), YaPOConfig(layers=2, sae=sae_wide))
    code = torch.zeros(4608)
    code[torch.randperm(4608)[:500]] = torch.randn(500)
    set_code(model, code)
    model.save_pretrained(tmp_path)
    assert (tmp_path / FILE).stat().st_size < 8192
    tensors = load_file(tmp_path / FILE)
    name = "base_model.model.model.layers.2.yapo.yapo_code"
    assert set(tensors) == {f"{name}.{part}" for part in ("indices", "values", "sae", "digest")}
    assert bytes(tensors[f"{name}.sae"].tolist()).hex() == model.peft_config["default"].sae_identity[0]["content_hash"]
    assert torch.equal(tensors[f"{name}.indices"], code.nonzero().squeeze(-1).int())
    assert torch.equal(tensors[f"{name}.values"], code[code != 0])


@pytest.mark.parametrize("space", ["sae", "dense"])
def test_a_model_on_the_meta_device_gives_shapes(space):
    model = steered_model() if space == "sae" else get_peft_model(make_model(), YaPOConfig(layers=2, space="dense"))
    model.to("meta")
    assert model(random_ids().to("meta")).logits.shape == (*random_ids().shape, VOCABULARY)


def test_a_truncated_file_is_refused(tmp_path):
    steered_model().save_pretrained(tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AdapterFileError, match=r"adapter_model.safetensors' is truncated or not a safetensors file"):
        PeftModel.from_pretrained(make_model(), tmp_path)


@pytest.mark.feature("SAEs", "Another SAE than the one that the adapter was trained on", refused="its hash differs")
def test_another_sae_than_the_one_trained_on_is_refused(tmp_path, sae_folder):
    model = get_peft_model(make_model(), YaPOConfig(layers=2, sae_path=sae_folder("gated", seed=11)))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["sae_path"] = sae_folder("standard", seed=12)
    config["sae_identity"][0]["content_hash"] = "0" * 64
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(
        SAEMismatchError, match=r"The SAE for layer 2 is not the one .*architecture: 'gated' in training"
    ):
        PeftModel.from_pretrained(make_model(), tmp_path)


@pytest.mark.parametrize("how", ["load_adapter", "state dict"])
def test_a_code_is_not_loaded_into_an_adapter_that_has_another_sae(tmp_path, how):
    steered_model().save_pretrained(tmp_path)
    other = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae(seed=77)))
    load = {
        "load_adapter": lambda: other.load_adapter(tmp_path, "default"),
        "state dict": lambda: set_peft_model_state_dict(other, load_file(tmp_path / FILE)),
    }
    with pytest.raises(SAEMismatchError, match="a code is only valid for the SAE"):
        load[how]()


def test_a_model_of_another_width_is_refused(tmp_path):
    steered_model().save_pretrained(tmp_path)
    from transformers import LlamaConfig, LlamaForCausalLM

    wide = LlamaForCausalLM(LlamaConfig(hidden_size=48, num_hidden_layers=4, num_attention_heads=4, vocab_size=64))
    with pytest.raises(SAEMismatchError, match="width 32, but the model's are 48 wide"):
        PeftModel.from_pretrained(wide, tmp_path)


@pytest.mark.feature("transformers", "`add_adapter`, `disable_adapters`")
def test_transformers_can_attach_and_delete_it():
    ids, model = random_ids(), make_model()
    base = model(ids).logits
    model.add_adapter(YaPOConfig(layers=2, sae=make_sae()))
    set_code(model, random_code())
    assert not torch.equal(model(ids).logits, base)
    with steering(model, 0):
        assert torch.equal(model(ids).logits, base)
    model.disable_adapters()
    assert torch.equal(model(ids).logits, base)


@pytest.mark.feature(
    "transformers",
    "`load_adapter`, and `AutoModelForCausalLM.from_pretrained` of an adapter's folder",
    refused="they match a file's tensors by name, and codes are saved sparse: use PeftModel",
)
@pytest.mark.parametrize("options", [{}, {"space": "dense", "sae": None}])
def test_transformers_own_loader_is_refused_with_the_way_that_works(tmp_path, options):
    steered_model(**options).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedOperationError, match=r"Load the adapter with peft\.PeftModel"):
        make_model().load_adapter(str(tmp_path))


def test_several_active_adapters_add_their_shifts():
    ids, model = random_ids(), steered_model()
    model.add_adapter("second", YaPOConfig(layers=2, sae=make_sae("standard", seed=3)))
    set_code(model, random_code(seed=5), "second")
    states = {}
    for name in ("default", "second", ["default", "second"]):
        model.base_model.set_adapter(name)
        states[str(name)] = model(ids, output_hidden_states=True).hidden_states[3]
    base = make_model()(ids, output_hidden_states=True).hidden_states[3]
    together = states["['default', 'second']"]
    torch.testing.assert_close(together - base, (states["default"] - base) + (states["second"] - base))


def test_with_several_layers_the_lowest_code_gets_its_gradient_through_the_others():
    model = steered_model(layers=[1, 3], sae=[make_sae(), make_sae()])
    inputs = model.get_input_embeddings()(random_ids()).detach().requires_grad_()
    model(inputs_embeds=inputs).logits.logsumexp(-1).sum().backward()
    lower, upper = (layer.yapo_code["default"].grad for layer in steered_layers(model))
    assert lower.any()
    assert upper.any()
    assert inputs.grad is None
