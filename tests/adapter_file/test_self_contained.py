"""Adapters that carry the part of the SAE which their code needs."""

import json
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURES, D_MODEL, D_SAE, SAE_KINDS, make_model, make_sae, random_code, random_ids, set_code
from torch.testing import assert_close

from yapo_peft import (
    AdapterFileError,
    ConfigError,
    SAENotFoundError,
    YaPOConfig,
    set_multiplier,
    steering,
)
from yapo_peft.sae import SAEPart, loader
from yapo_peft.tuner.adapters import steered_layers


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Saves a self-contained adapter, and takes its SAE away."""

    def save(kind="jumprelu", code=None, architecture="llama", **options):
        model = get_peft_model(
            make_model(architecture), YaPOConfig(layers=2, sae=make_sae(kind, **options), self_contained=True)
        ).eval()
        set_code(model, random_code(0.2) if code is None else code)
        model.save_pretrained(tmp_path / "adapter")
        monkeypatch.setattr(loader, "_registered", {})
        return model, tmp_path / "adapter"

    return save


def logits(model, multiplier, **inputs):
    with torch.no_grad(), steering(model, multiplier):
        return model(random_ids(), **inputs).logits


@pytest.mark.feature("Speed", "`YaPOConfig(self_contained=True)`: adapters that need neither the SAE nor sae-lens")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("multiplier", [-2.0, 1.0, 0.3])
def test_a_self_contained_adapter_steers_without_its_sae(saved, architecture, multiplier):
    model, folder = saved(architecture=architecture)
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(make_model(architecture), folder, **options).eval()
        assert isinstance(steered_layers(loaded)[0].yapo_sae["default"], SAEPart)
        assert_close(logits(loaded, multiplier), logits(model, multiplier), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in SAE_KINDS if kind != "topk"])
@pytest.mark.parametrize("normalization", ["none", "layer_norm"])
def test_every_element_wise_encoder_can_be_carried(saved, kind, normalization):
    options = {} if kind == "batchtopk" else {"normalize_activations": normalization}
    model, folder = saved(kind, **options)
    loaded = PeftModel.from_pretrained(make_model(), folder).eval()
    for multiplier in (1.0, -1.0, torch.tensor([-1.0, 2.0])):
        assert_close(logits(loaded, multiplier), logits(model, multiplier), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_topk_sae_is_carried_for_multipliers_of_one_sign(saved, sign):
    model, folder = saved("topk", code=sign * random_code(0.2).abs())
    assert not any("W_enc" in name for name in load_file(folder / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(make_model(), folder).eval()
    assert_close(logits(loaded, 1.5 * sign), logits(model, 1.5 * sign), rtol=1e-5, atol=1e-5)
    with pytest.raises(SAENotFoundError, match="TopK SAE at multipliers of the other sign"):
        logits(loaded, -1.5 * sign)


def test_the_encoder_of_a_topk_sae_is_carried_for_a_code_of_both_signs(saved, tmp_path):
    with pytest.warns(UserWarning, match=r"gets the whole encoder of a TopK SAE \(0 MB\).*yapo convert"):
        model, folder = saved("topk")
    loaded = PeftModel.from_pretrained(make_model(), folder).eval()
    for multiplier in (1.5, -1.0, torch.tensor([-1.0, 2.0])):
        assert_close(logits(loaded, multiplier), logits(model, multiplier), rtol=1e-5, atol=1e-5)
    with pytest.warns(UserWarning, match="whole encoder"):
        loaded.save_pretrained(tmp_path / "again")
    first, second = (load_file(place / "adapter_model.safetensors") for place in (folder, tmp_path / "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    (name,) = [name for name in first if name.endswith("part_W_enc")]
    save_file(first | {name: first[name][:, :-1].contiguous()}, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterFileError, match="The SAE's part for layer 2 is not what was saved"):
        PeftModel.from_pretrained(make_model(), folder)


def test_the_file_holds_the_features_of_the_code_alone(saved):
    code = random_code(0.2)
    _, folder = saved(code=code)
    tensors = {name.rpartition(".part_")[2]: t for name, t in load_file(folder / "adapter_model.safetensors").items()}
    n = int(code.count_nonzero())
    assert tensors["W_enc"].shape == (D_MODEL, n)
    assert tensors["W_dec"].shape == (n, D_MODEL)
    assert tensors["threshold"].shape == (n,)
    assert torch.equal(tensors["W_dec"], make_sae().W_dec.data[code.nonzero().squeeze(-1)])


def test_nothing_of_sae_lens_is_imported(saved):
    model, folder = saved()
    make_model().save_pretrained(folder.parent / "base")
    code = (
        "import sys, torch, yapo_peft, transformers\nfrom peft import PeftModel\n"
        f"base = transformers.AutoModelForCausalLM.from_pretrained({str(folder.parent / 'base')!r})\n"
        f"model = PeftModel.from_pretrained(base, {str(folder)!r}).eval()\n"
        "assert 'sae_lens' not in sys.modules\n"
        f"print(model(torch.tensor({random_ids().tolist()})).logits.sum().item())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(printed) == pytest.approx(float(logits(model, 1.0).sum()), rel=1e-4)


def test_it_is_saved_again_as_it_was_loaded(saved, tmp_path):
    _, folder = saved()
    PeftModel.from_pretrained(make_model(), folder).save_pretrained(tmp_path / "again")
    first, second = (load_file(place / "adapter_model.safetensors") for place in (folder, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_multipliers_rows_generation_and_merging_work_without_the_sae(saved):
    model, folder = saved(code=random_code(0.2).abs())
    loaded = PeftModel.from_pretrained(make_model(), folder).eval()
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "multipliers": [-1.0, 1.5]}
    assert torch.equal(loaded.generate(random_ids(), **options), model.generate(random_ids(), **options))
    set_multiplier(loaded, 0.5)
    expected = logits(loaded, 0.5)
    with torch.no_grad():
        assert_close(loaded.merge_and_unload()(random_ids()).logits, expected, rtol=1e-5, atol=1e-5)


def test_training_finds_the_whole_sae_or_says_that_it_needs_it(tmp_path, sae_folder, monkeypatch):
    path = sae_folder()
    model = get_peft_model(make_model(), YaPOConfig(layers=2, sae_path=path, self_contained=True))
    set_code(model, random_code(0.2))
    model.save_pretrained(tmp_path / "adapter")
    gradients = []
    for trained in (model, PeftModel.from_pretrained(make_model(), tmp_path / "adapter", is_trainable=True)):
        trained(random_ids()).logits.logsumexp(-1).sum().backward()
        gradients.append(steered_layers(trained)[0].yapo_code["default"].grad)
    assert_close(gradients[0], gradients[1])
    shutil.rmtree(path)
    for known in ("_by_source", "_registered"):
        monkeypatch.setattr(loader, known, {})
    loaded = PeftModel.from_pretrained(make_model(), tmp_path / "adapter", is_trainable=True)
    with pytest.raises(SAENotFoundError, match="contains only the part of its SAE that its own code needs"):
        loaded(random_ids())
    monkeypatch.setitem(sys.modules, "sae_lens", None)  # not installed
    set_code(loaded.eval(), random_code(0.9))
    with pytest.raises(SAENotFoundError, match="changing its code"), torch.no_grad():
        loaded(random_ids())
    monkeypatch.setattr(loader, "_FILES", ())
    with pytest.raises(SAENotFoundError, match=r"changing its code.*sae_lens"), torch.no_grad():
        loaded(random_ids())


def test_a_new_code_of_all_zeros_is_saved_too(saved):
    _, folder = saved(code=torch.zeros(D_SAE))
    loaded = PeftModel.from_pretrained(make_model(), folder).eval()
    with torch.no_grad():
        assert torch.equal(logits(loaded, 1.0), make_model()(random_ids()).logits)


def test_parts_of_other_layers_are_refused(tmp_path):
    saes = [make_sae(seed=1), make_sae(seed=2)]
    model = get_peft_model(make_model(), YaPOConfig(layers=[1, 2], sae=saes, self_contained=True))
    set_code(model, random_code(0.2))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    other = {"1": "2", "2": "1"}

    def swapped(name):
        block, _, tail = name.partition(".yapo.")
        head, _, layer = block.rpartition(".")
        return f"{head}.{other[layer]}.yapo.{tail}" if ".part_" in name else name

    save_file({swapped(name): t.clone() for name, t in tensors.items()}, file)
    with pytest.raises(AdapterFileError, match="of another layer"):
        PeftModel.from_pretrained(make_model(), tmp_path)
    stray = {name.replace("layers.1.", "layers.3."): t.clone() for name, t in tensors.items() if ".part_" in name}
    save_file(tensors | stray, file)
    with pytest.raises(AdapterFileError, match=r"codes for layers \[1, 2, 3\], its config steers \[1, 2\]"):
        PeftModel.from_pretrained(make_model(), tmp_path)


def test_a_loaded_model_can_be_pickled(saved):
    _, folder = saved()
    loaded = PeftModel.from_pretrained(make_model(), folder).eval()
    assert torch.equal(logits(pickle.loads(pickle.dumps(loaded)), 1.0), logits(loaded, 1.0))


def test_the_flag_is_checked_and_saved(saved):
    with pytest.raises(ConfigError, match="self_contained='yes'"):
        YaPOConfig(layers=2, sae=make_sae(), self_contained="yes")
    _, folder = saved()
    assert json.loads((folder / "adapter_config.json").read_text())["self_contained"] is True


def test_an_auto_class_loads_it(saved, tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    model, folder = saved()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": str(tmp_path / "base")})
    )
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    assert_close(logits(loaded, 1.0), logits(model, 1.0), rtol=1e-5, atol=1e-5)
