"""PEFT's functions beside its classes: those that fit the method, and those that are for others."""

import pytest
import torch
from peft import (
    LoraConfig,
    PeftMixedModel,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter
from tiny import make_model, make_sae, random_code, random_ids, set_code

from yapo_peft import YaPOConfig


def config():
    return YaPOConfig(layers=2, sae=make_sae())


@pytest.fixture
def model():
    model = get_peft_model(make_model(), config()).eval()
    set_code(model, random_code())
    return model


def logits(model):
    with torch.no_grad():
        return model(random_ids()).logits


@pytest.mark.feature("PEFT", "`get_peft_model_state_dict` and `set_peft_model_state_dict`")
def test_a_state_dict_goes_from_model_to_model(model):
    other = get_peft_model(make_model(), config()).eval()
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert torch.equal(logits(other), logits(model))


@pytest.mark.feature("PEFT", "`inject_adapter_in_model`, also with a `state_dict`")
@pytest.mark.parametrize("with_state_dict", [True, False])
def test_injecting_without_a_peft_model(model, with_state_dict):
    state = get_peft_model_state_dict(model)
    injected = inject_adapter_in_model(config(), make_model(), state_dict=state if with_state_dict else None)
    set_peft_model_state_dict(injected, state)
    assert torch.equal(logits(injected.eval()), logits(model))
    assert [name for name, p in injected.named_parameters() if p.requires_grad] == [
        "model.layers.2.yapo.yapo_code.default"
    ]


@pytest.mark.feature("PEFT", "`prepare_model_for_kbit_training`")
def test_preparing_for_quantised_training(model):
    prepared = get_peft_model(prepare_model_for_kbit_training(make_model()), config()).eval()
    set_code(prepared, random_code())
    assert torch.equal(logits(prepared), logits(model))
    prepared.train()(random_ids(), labels=random_ids()).loss.backward()
    with_gradient = [name for name, p in prepared.named_parameters() if p.grad is not None]
    assert with_gradient == ["base_model.model.model.layers.2.yapo.yapo_code.default"]


REFUSED = {
    "hotswap_adapter": (lambda model, folder: hotswap_adapter(model, str(folder), "default"), "only supports LORA"),
    "mixed=True": (lambda model, folder: get_peft_model(make_model(), config(), mixed=True), "not compatible"),
    "PeftMixedModel": (lambda model, folder: PeftMixedModel.from_pretrained(make_model(), folder), "not supported"),
    "LoRA in the same PeftModel": (lambda model, folder: model.add_adapter("other", LoraConfig()), "Cannot combine"),
    "convert_to_lora": (lambda model, folder: convert_to_lora(model, rank=4), "do not support LoRA conversion"),
    "path_initial_model_for_weight_conversion": (
        lambda model, folder: model.save_pretrained(folder, path_initial_model_for_weight_conversion=folder),
        "is not supported for YaPOModel",
    ),
}


@pytest.mark.feature(
    "PEFT",
    "`hotswap_adapter`, mixed models, `convert_to_lora`, `path_initial_model_for_weight_conversion`",
    refused="PEFT offers them for LoRA, and methods that are matrices like it",
)
@pytest.mark.parametrize("name", REFUSED)
def test_what_peft_offers_to_other_methods_only(model, tmp_path, name):
    model.save_pretrained(tmp_path)
    call, message = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=message):
        call(model, tmp_path)
