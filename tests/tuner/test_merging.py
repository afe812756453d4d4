import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from tiny import make_model, make_sae, random_code, random_ids, set_code

from yapo_peft import AdapterFileError, ConfigError, UnsupportedOperationError, YaPOConfig, set_multiplier, steering
from yapo_peft.tuner.adapters import steered_layers
from yapo_peft.tuner.merging import probe


def steered(architecture="llama", code=None, dtype=torch.float32, **options):
    model = get_peft_model(
        make_model(architecture, dtype), YaPOConfig(**{"layers": 2, "sae": make_sae()} | options)
    ).eval()
    set_code(model, random_code().abs() if code is None else code)
    return model


@pytest.mark.feature(
    "PEFT", "`merge_and_unload`, and in place `merge_adapter` (GPT-2), where multiplier x code is nowhere negative"
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("sae", ["jumprelu", "topk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_constant_steering_becomes_a_bias_that_needs_no_package(architecture, sae, dtype, tmp_path):
    model = steered(architecture, layers=[1, 3], sae=[make_sae(sae), make_sae()], dtype=dtype)
    set_multiplier(model, 1.5)
    expected = model(random_ids()).logits
    merged = model.merge_and_unload(safe_merge=True)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.2}
    torch.testing.assert_close(merged(random_ids()).logits, expected, **tolerance)
    merged.save_pretrained(tmp_path / "model")
    torch.save(merged(random_ids()).logits, tmp_path / "logits.pt")
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM as M; from pathlib import Path\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "model, info = M.from_pretrained(folder / 'model', output_loading_info=True)\n"
        "assert not info['missing_keys'] and not info['unexpected_keys'], info\n"
        f"ids = torch.tensor({random_ids().tolist()})\n"
        "assert torch.equal(model(ids).logits, torch.load(folder / 'logits.pt'))\n"
        "assert 'yapo_peft' not in sys.modules and 'peft.tuners' not in sys.modules"
    )
    if dtype == torch.float32 and sae == "jumprelu":
        subprocess.run([sys.executable, "-c", script], check=True)


def test_a_negative_multiplier_merges_a_code_without_positive_entries():
    model = steered(code=-random_code().abs())
    set_multiplier(model, -2.0)
    expected = model(random_ids()).logits
    torch.testing.assert_close(model.merge_and_unload()(random_ids()).logits, expected, rtol=1e-4, atol=1e-4)


def test_merging_can_be_taken_back_to_the_last_bit():
    model = steered("gpt2")
    base, before = make_model("gpt2").state_dict(), model(random_ids()).logits
    model.merge_adapter()
    assert steered_layers(model)[0].merged_adapters == ["default"]
    torch.testing.assert_close(model(random_ids()).logits, before, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(model(random_ids()).logits, before)
    assert all(torch.equal(model.base_model.model.state_dict()[name], value) for name, value in base.items())
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(random_ids()).logits, make_model("gpt2")(random_ids()).logits)


def test_only_the_named_adapters_are_merged():
    model = steered()
    model.add_adapter("other", YaPOConfig(layers=1, sae=make_sae("standard", seed=3)))
    set_code(model, random_code(seed=4).abs(), "other")
    with steering(model, 1.0, "other"):
        expected = model(random_ids()).logits
    merged = model.merge_and_unload(adapter_names=["other"])
    torch.testing.assert_close(merged(random_ids()).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
def test_adapters_of_one_layer_are_merged_one_after_the_other(monkeypatch):
    model = steered("gpt2")
    model.add_adapter("other", YaPOConfig(layers=2, sae=make_sae("standard", seed=3)))
    set_code(model, random_code(seed=4).abs(), "other")
    expected = []
    for names in (["default"], ["default", "other"]):
        model.base_model.set_adapter(names)
        expected.append(model(random_ids()).logits)
    model.merge_adapter(["default"])
    with monkeypatch.context() as patch:
        patch.setattr("yapo_peft.tuner.merging.fold", lambda layers, shifts, safe: None)
        with pytest.raises(UnsupportedOperationError, match="scale or normalise"):
            model.merge_adapter(["other"])
    torch.testing.assert_close(model(random_ids()).logits, expected[0], rtol=1e-4, atol=1e-4)
    model.merge_adapter(["other"])
    assert steered_layers(model)[0].merged_adapters == ["default", "other"]
    torch.testing.assert_close(model(random_ids()).logits, expected[1], rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(model(random_ids()).logits, expected[1])


def test_a_merged_multiplier_is_fixed_until_it_is_unmerged():
    model = steered("gpt2")
    model.merge_adapter()
    with pytest.raises(ConfigError, match="call unmerge_adapter"):
        set_multiplier(model, 2.0)
    for rows in ({"adapter_names": ["default", "__base__"]}, {"multipliers": [1.0, 2.0]}):
        with pytest.raises(ConfigError, match=r"call unmerge_adapter\(\) first"):
            model(random_ids(), **rows)


NOT_CONSTANT = {
    "a feature is lowered": (lambda: steered(code=random_code()), r"it lowers \d+ of its \d+ features of layer 2"),
    "multiplier per row": (lambda: steered(), "its multiplier differs by row"),
    "some tokens only": (lambda: steered(positions="last"), "only the tokens of positions='last'"),
    "normalised input": (
        lambda: steered(sae=make_sae(normalize_activations="layer_norm")),
        "its SAE scales each token by itself",
    ),
}


@pytest.mark.feature(
    "PEFT",
    "`merge_and_unload` where a feature is lowered, or only some tokens or rows are steered",
    refused="the shift depends on the token, and no weight can hold it",
)
@pytest.mark.parametrize("case", NOT_CONSTANT)
@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter"])
def test_a_steering_that_is_not_constant_is_refused_with_the_reason(case, method):
    make, message = NOT_CONSTANT[case]
    model = make()
    if case == "multiplier per row":
        set_multiplier(model, torch.ones(2))
    before = model(random_ids()).logits
    with pytest.raises(UnsupportedOperationError, match=message):
        getattr(model, method)()
    assert torch.equal(model(random_ids()).logits, before)


@pytest.mark.feature(
    "PEFT",
    "`merge_and_unload` into layers without a bias for it (Gemma, Qwen), or quantised ones",
    refused="the architecture has no parameter that could hold it",
)
@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_an_architecture_without_a_bias_is_refused(architecture):
    model = steered(architecture)
    with pytest.raises(UnsupportedOperationError, match="its config has no mlp_bias"):
        model.merge_and_unload()


@pytest.mark.feature(
    "PEFT",
    "`merge_adapter` in place into layers without a bias (Llama)",
    refused="the model would get parameters that its config does not mention",
)
def test_merging_in_place_adds_no_parameters():
    model = steered()
    with pytest.raises(UnsupportedOperationError, match="cannot be merged in place"):
        model.merge_adapter()
    assert steered_layers(model)[0].merged_adapters == []
    model.merge_and_unload()


def test_a_bias_that_is_not_added_to_the_output_as_it_is_is_noticed():
    model = steered("gpt2")
    block = steered_layers(model)[0].block
    block.mlp.dropout = torch.nn.Hardtanh(-0.01, 0.01)
    before = probe(model.base_model.model, steered_layers(model))
    with pytest.raises(UnsupportedOperationError, match="scale or normalise"):
        model.merge_adapter()
    assert torch.equal(probe(model.base_model.model, steered_layers(model))[0], before[0])


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model")
def test_another_adapter_within_the_block_is_refused():
    model = steered()
    inject_adapter_in_model(LoraConfig(target_modules=["down_proj"]), model.base_model.model)
    with pytest.raises(UnsupportedOperationError, match="another method's adapter"):
        model.merge_adapter()


def test_safe_merge_finds_a_broken_code():
    code = random_code().abs()
    code[0] = float("inf")
    with pytest.raises(AdapterFileError, match="NaN or infinity"):
        steered(code=code).merge_and_unload(safe_merge=True)
