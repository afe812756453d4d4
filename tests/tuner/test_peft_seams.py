"""What the tuner relies on in PEFT without promise still exists, with the signatures it was written for."""

import inspect
from contextlib import contextmanager

import pytest
import torch
from peft import PeftModel, get_peft_model, mapping
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from tiny import make_model, make_sae

from yapo_peft import YaPOConfig, YaPOModel

# (owner, name): its parameters, and what we use it for.
METHODS = {
    (BaseTuner, "_prepare_adapter_config"): ("peft_config model_config", "finds the layers and checks the SAEs"),
    (BaseTuner, "_check_target_module_exists"): ("peft_config key", "names the decoder layers to steer"),
    (BaseTuner, "_create_and_replace"): (
        "peft_config adapter_name target target_name parent current_key parameter_name",
        "attaches a steered layer",
    ),
    (BaseTuner, "_unload_and_optionally_merge"): (
        "merge progressbar safe_merge adapter_names",
        "leaves the model as it was found, or with merged biases",
    ),
    (BaseTuner, "_get_adapter_state_dict"): (
        "model config adapter_name state_dict unwanted_adapter_names",
        "saves codes as indices and values",
    ),
    (BaseTuner, "_remap_adapter_state_dict_for_load"): ("model config adapter_name state_dict", "loads saved codes"),
    (BaseTuner, "inject_adapter"): (
        "model adapter_name autocast_adapter_dtype low_cpu_mem_usage state_dict",
        "loads SAEs outside the context of the meta device",
    ),
    (BaseTunerLayer, "_move_adapter_to_device_of_base_layer"): ("adapter_name device", "moves codes, in float32"),
    (BaseTunerLayer, "enable_adapters"): ("enabled", "takes merged shifts out of disabled layers"),
    (BaseTunerLayer, "set_adapter"): ("adapter_names inference_mode", "freezes the codes of inactive adapters"),
}


@pytest.mark.parametrize(("owner", "name"), METHODS, ids=lambda value: getattr(value, "__name__", value))
def test_method_has_the_expected_signature(owner, name):
    expected, purpose = METHODS[owner, name]
    method = getattr(owner, name, None)
    assert method is not None, f"{owner.__name__}.{name} is gone; the tuner {purpose} with it"
    found = [parameter for parameter in inspect.signature(method).parameters if parameter not in ("self", "cls")]
    assert found == expected.split(), f"{owner.__name__}.{name} changed; the tuner {purpose} with it"


def test_every_overridden_private_method_is_listed():
    own = {name for name in vars(YaPOModel) if name.startswith("_") and not name.startswith("__")}
    overridden = {name for name in own if hasattr(BaseTuner, name)} - {"_abc_impl"}
    listed = {name for owner, name in METHODS if owner is BaseTuner}
    assert overridden <= listed | {"_enable_adapter_layers"}


def test_the_tables_of_methods_are_dicts_that_the_registration_writes():
    for name in ("PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING", "PEFT_TYPE_TO_PREFIX_MAPPING"):
        assert isinstance(getattr(mapping, name, None), dict), f"peft.mapping.{name} changed; registration writes it"


def test_private_state_is_where_the_tuner_reads_and_writes_it():
    model = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae()))
    layer = next(module for module in model.modules() if isinstance(module, BaseTunerLayer))
    assert layer._active_adapter == ["default"], "BaseTunerLayer._active_adapter changed; steering() sets it"
    assert isinstance(model, PeftModel)
    assert isinstance(model.base_model, YaPOModel), "PeftModel.base_model is not the tuner; generate is found there"
    config = YaPOConfig(layers=2, sae=make_sae(), modules_to_save=["lm_head"])
    wrapped = get_peft_model(make_model(), config).get_base_model().lm_head
    assert isinstance(wrapped, AuxiliaryTrainingWrapper)
    assert wrapped._adapters == {"default"}, "AuxiliaryTrainingWrapper._adapters changed; unloading finds modules by it"


def test_forward_and_generate_enter_the_tuners_hooks(monkeypatch):
    entered = []
    model = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae()))

    @contextmanager
    def enter(*args, **kwargs):
        entered.append(1)
        yield

    monkeypatch.setattr(model.base_model, "_enable_peft_forward_hooks", enter)
    ids = torch.ones(1, 3, dtype=torch.long)
    model(input_ids=ids)
    model.generate(input_ids=ids, max_new_tokens=1)
    assert len(entered) >= 2, "PeftModel no longer enters _enable_peft_forward_hooks; adapter_names= relies on it"
