"""Cached activations on disk: whose they are, that nothing is lost or computed twice, and how they are deleted."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from cached import HELD_OUT, MANY
from datasets import Dataset
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from tiny import make_model, make_sae, preference_rows, trained_codes
from torch.testing import assert_close

from yapo_peft import ActivationCacheError, YaPOConfig, delete_activation_cache
from yapo_peft._utils import hash_tensors
from yapo_peft.scoring import cache
from yapo_peft.scoring import store as activations


def parts_of(folder):
    return sorted(Path(folder).glob("activations/*/part-*.safetensors"))


@pytest.mark.feature("Speed", "A killed run's cache is completed, and later runs and seeds use it")
def test_cached_activations_are_not_computed_again(train, tmp_path, monkeypatch):
    monkeypatch.setattr(activations, "_TOKENS", 60)
    first = train(True)
    parts = parts_of(tmp_path)
    assert len(parts) > 4
    written = {part: part.stat().st_mtime_ns for part in parts}
    parts[1].unlink()
    computed = []
    compute = cache.ActivationCache._compute
    counting = lambda self, examples, *args: computed.extend(examples) or compute(self, examples, *args)  # noqa: E731
    monkeypatch.setattr(cache.ActivationCache, "_compute", counting)
    again = train(True)
    assert 0 < len(computed) < len(MANY) / 2
    assert parts_of(tmp_path) == parts
    assert all(part.stat().st_mtime_ns == written[part] for part in parts if part != parts[1])
    assert_close(trained_codes(again), trained_codes(first), rtol=1e-6, atol=1e-7)
    computed.clear()
    train(True, seed=7, direction="both", learning_rate=0.01)
    assert not computed


def test_a_dense_vector_uses_what_a_code_left_on_disk(train, tmp_path, monkeypatch):
    train(True, max_steps=1)
    parts = parts_of(tmp_path)
    (tmp_path / "activations" / "other").mkdir()
    (tmp_path / "activations" / "other" / "activations.json").write_text("{")
    dense = train(True, adapter={"space": "dense", "sae": None})
    assert parts_of(tmp_path) == parts
    shutil.rmtree(tmp_path / "activations")
    alone = train(True, adapter={"space": "dense", "sae": None})
    assert_close(trained_codes(dense), trained_codes(alone), rtol=1e-6, atol=1e-7)


def test_a_failure_leaves_no_file_behind(train, tmp_path, monkeypatch):
    def fail(tensors, file, metadata):
        Path(file).write_bytes(b"half of it")
        raise OSError("the disk is gone")

    monkeypatch.setattr(activations, "save_file", fail)
    with pytest.raises(ActivationCacheError, match=r"the disk is gone.*make room"):
        train(True)
    assert [file.name for file in tmp_path.glob("activations/*/*")] == ["activations.json"]


@pytest.mark.parametrize("tensor", ["hidden", "count", "feature", "value", "reference"])
def test_damaged_activations_are_detected(train, tmp_path, tensor):
    train(True, max_steps=1)
    file = max(parts_of(tmp_path), key=lambda part: part.stat().st_size)  # of the training set
    content = bytearray(file.read_bytes())
    header = int.from_bytes(content[:8], "little")
    start, end = json.loads(content[8 : 8 + header])[tensor]["data_offsets"]
    content[8 + header + (start + end) // 2] ^= 0x41
    file.write_bytes(content)
    with pytest.raises(ActivationCacheError, match=r"its content, or its place, does not match its hash.*Delete it"):
        train(True, max_steps=1)


@pytest.mark.parametrize("taken_from", ["the same cache", "another model's"])
def test_a_part_does_not_stand_in_for_another(train, tmp_path, monkeypatch, taken_from):
    # Rows of one length, so that only what they hold differs between parts.
    monkeypatch.setattr(activations, "_TOKENS", 1)
    rows = {"prompt": "w1 w2", "chosen": " w3 w4", "rejected": " w5 w6"}
    options = {"train_dataset": Dataset.from_list([rows, {**rows, "chosen": " w7 w8"}]), "init": {}, "max_steps": 1}
    train(True, model="gpt2", **options)
    (other,) = (tmp_path / "activations").iterdir()
    train(True, **options)
    (own,) = (folder for folder in (tmp_path / "activations").iterdir() if folder != other)
    source = own if taken_from == "the same cache" else other
    shutil.copy(source / "part-00001.safetensors", own / "part-00000.safetensors")
    with pytest.raises(ActivationCacheError, match=r"its place, does not match its hash"):
        train(True, **options)


CHANGES = {
    "model": {"model": "gpt2"},
    "layer": {"adapter": {"layers": 1}},
    "sae": {"adapter": {"sae": make_sae(seed=3)}},
    "data": {"train_dataset": Dataset.from_list(preference_rows(16, seed=8))},
    "max_length": {"max_length": 13},
    "dtype": {"activation_cache_dtype": "bfloat16"},
}


@pytest.mark.filterwarnings("ignore:.*are cut to max_length=13")
@pytest.mark.parametrize("change", CHANGES)
def test_each_model_sae_dataset_and_dtype_has_its_own_cache(train, change, tmp_path):
    train(True, init={})
    train(True, init={}, **CHANGES[change])
    assert len(list((tmp_path / "activations").iterdir())) == 2
    records = [json.loads(file.read_text()) for file in tmp_path.glob("activations/*/activations.json")]
    assert records[0] != records[1]


def test_changed_weights_have_their_own_cache(train, tmp_path):
    for scale in (1.0, 1.01):
        model = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae()))
        model.get_base_model().lm_head.weight.data.mul_(scale)
        train(True, model=model, init={})
    assert len(list((tmp_path / "activations").iterdir())) == 2


@pytest.mark.filterwarnings("ignore:.*modify a model with PEFT", "ignore:Already found")
def test_each_lora_scaling_has_its_own_cache(train, tmp_path):
    for alpha in (8, 32):
        base = make_model()
        torch.manual_seed(0)
        inject_adapter_in_model(
            LoraConfig(target_modules=["q_proj"], init_lora_weights=False, lora_alpha=alpha), base, "default"
        )
        base.requires_grad_(False)
        train(True, model=get_peft_model(base, YaPOConfig(layers=2, sae=make_sae())), init={})
    assert len(list((tmp_path / "activations").iterdir())) == 2


def test_activations_of_another_model_are_rejected(train, tmp_path):
    from safetensors.torch import load_file, save_file

    train(True, init={})
    (part,) = parts_of(tmp_path)
    tensors = load_file(part)
    tensors["hidden"] = tensors["hidden"].flip(0).contiguous()
    save_file(tensors, part, metadata={"sha256": hash_tensors(f"{part.parent.name}/0", sorted(tensors.items()))})
    with pytest.raises(ActivationCacheError, match="Delete that folder"):
        train(True, init={})
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(ActivationCacheError, match="cannot be read"):
        train(True, init={})


@pytest.mark.filterwarnings("ignore:.*are cut to max_length=13")
@pytest.mark.feature("Speed", "Space is estimated beforehand; too little of it is an error before the work")
def test_too_little_disk_space_fails_before_any_computation(train, tmp_path, monkeypatch, capsys):
    train(True, init={})
    said = capsys.readouterr().out
    (part,) = parts_of(tmp_path)
    monkeypatch.setattr(activations.shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    train(True, init={})
    with pytest.raises(ActivationCacheError, match="has 0 MB left"):
        train(True, init={}, max_length=13)
    assert parts_of(tmp_path) == [part]
    assert "Caching the activations of" in said


def test_the_estimate_is_close(train, tmp_path, monkeypatch):
    seen = []
    announce = cache.ActivationCache._announce

    def listen(self, store, name, sizes, width, why):
        seen.append(sum(sizes) * width)
        announce(self, store, name, sizes, width, why)

    monkeypatch.setattr(cache.ActivationCache, "_announce", listen)
    train(True, init={})
    (part,) = parts_of(tmp_path)
    assert seen[0] == pytest.approx(part.stat().st_size, rel=0.2)


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_activations_stored_in_16_bits_take_half_the_space_and_train_close(train, stored, tmp_path):
    exact = trained_codes(train(True))
    whole = sum(file.stat().st_size for file in (tmp_path / "activations").glob("*/*"))
    shutil.rmtree(tmp_path / "activations")
    rounded = trained_codes(train(True, activation_cache_dtype=stored))
    half = sum(file.stat().st_size for file in (tmp_path / "activations").glob("*/*"))
    assert half < 0.75 * whole
    assert 0 < float((rounded - exact).norm() / exact.norm()) < 0.2


def test_unwritable_folder_fails_before_any_computation(train, build, tmp_path, monkeypatch):
    (tmp_path / "activations").write_text("a file")
    with pytest.raises(ActivationCacheError, match="set another activation_cache_dir"):
        train(True)
    monkeypatch.setenv("HOME", str(tmp_path))
    build(train_dataset=MANY, cache_activations=True, activation_cache_dir="~/cache")
    assert delete_activation_cache(tmp_path / "cache") > 0


@pytest.mark.feature("Speed", "`delete_activation_cache()` deletes it all")
def test_one_call_deletes_the_cache(train, build, tmp_path, monkeypatch):
    train(True)
    folder = tmp_path / "activations"
    (folder / "not ours").mkdir()
    size = sum(file.stat().st_size for file in folder.glob("*/*"))
    assert delete_activation_cache(folder) == size
    assert [place.name for place in folder.iterdir()] == ["not ours"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    build(cache_activations=True, train_dataset=MANY, init={"eval_dataset": HELD_OUT})
    assert delete_activation_cache() == size
    assert delete_activation_cache() == 0
