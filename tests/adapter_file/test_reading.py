"""Saved adapters, read without a model."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import D_MODEL, make_model, make_sae, random_code, set_code

from yapo_peft import AdapterFileError, SAEMismatchError, YaPOConfig
from yapo_peft.adapter_file.reading import SavedAdapter
from yapo_peft.sae import SAEPart
from yapo_peft.tuner.adapters import steered_layers


@pytest.fixture
def save(tmp_path):
    def save(**options):
        model = get_peft_model(make_model(), YaPOConfig(**{"layers": [2, 1], **options}))
        set_code(model, random_code(0.2))
        model.save_pretrained(tmp_path)
        return model

    return save


@pytest.mark.parametrize("self_contained", [False, True])
def test_codes_and_saes_are_those_of_the_model(save, tmp_path, self_contained):
    model = save(sae=[make_sae(), make_sae("gated")], self_contained=self_contained)
    saved = SavedAdapter(str(tmp_path))
    assert saved.config.layers == [2, 1]
    codes = saved.codes(D_MODEL)
    assert codes.keys() == {1, 2}
    for layer in steered_layers(model):
        code, sae = layer.yapo_code["default"].data, saved.sae(layer.index)
        assert torch.equal(codes[layer.index], code)
        assert isinstance(sae, SAEPart) == self_contained
        assert sae.identity == saved.identities[layer.index] == layer.yapo_sae["default"].identity
        features = code.nonzero().squeeze(-1)
        rows = (own.decoder_rows(features, code.device, code.dtype) for own in (sae, layer.yapo_sae["default"]))
        assert torch.equal(*rows)


def test_a_dense_adapter_has_no_saes(save, tmp_path):
    model = save(space="dense")
    saved = SavedAdapter(str(tmp_path))
    assert saved.identities == {1: None, 2: None}
    assert saved.sae(1) is None
    assert torch.equal(saved.codes(D_MODEL)[1], steered_layers(model)[0].yapo_code["default"].data)
    with pytest.raises(AdapterFileError, match="belongs to another model"):
        saved.codes(D_MODEL + 1)


def test_an_sae_that_changed_is_rejected(save, tmp_path, sae_folder):
    path = sae_folder()
    save(layers=2, sae_path=path)
    make_sae("standard").save_model(path)
    with pytest.raises(SAEMismatchError, match="is not the one that the adapter was trained on"):
        SavedAdapter(str(tmp_path)).sae(2)


def test_what_is_not_a_whole_yapo_adapter_is_rejected(save, tmp_path):
    get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(AdapterFileError, match="of PEFT's method LORA, not of YaPO"):
        SavedAdapter(str(tmp_path / "lora"))
    with pytest.raises(AdapterFileError, match="No adapter can be read from"):
        SavedAdapter(str(tmp_path / "nothing"))
    save(space="dense")
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(AdapterFileError, match="truncated or not a safetensors file"):
        SavedAdapter(str(tmp_path))
