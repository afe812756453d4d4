"""Every behaviour that PEFT promises of an adapter, for each architecture and kind of adapter.

All combinations run with `--full`. Otherwise each behaviour meets every architecture and every kind once, in
combinations that differ between behaviours.
"""

import copy
import json
import pickle
import re

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from peft.utils import get_base_model_state_dict
from safetensors.torch import load_file
from tiny import ARCHITECTURES, CHECKPOINTING, D_SAE, make_model, make_sae, random_code, random_ids, set_code
from transformers import GenerationConfig

from yapo_peft import ConfigError, UnsupportedOperationError, YaPOConfig, steering
from yapo_peft.tuner.adapters import steered_layers
from yapo_peft.tuner.hooks import REPEATS_HOOKS

FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
GENERATE = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
PROMPT = 5


KINDS = {
    "one layer": {},
    "several layers": {"layers": [0, 2], "sae_kinds": ("jumprelu", "jumprelu")},
    "several SAEs": {"layers": [1, 3], "sae_kinds": ("standard", "topk")},
    "completion": {"positions": "completion"},
    "last": {"positions": "last"},
    "dense": {"space": "dense"},
    "bf16": {"dtype": torch.bfloat16},
}
# Where rounding does not decide between nearly equal tokens.
EXACT = {name: options for name, options in KINDS.items() if name != "bf16"}
pytestmark = pytest.mark.combine(architecture=ARCHITECTURES, kind=KINDS)
# For what does not depend on the model.
once = pytest.mark.combine(architecture=ARCHITECTURES[:1], kind={"one layer": {}})


class Row:
    """A base model and a kind of adapter."""

    def __init__(self, architecture, dtype=torch.float32, sae_kinds=("jumprelu",), **options):
        self.architecture, self.dtype, self.sae_kinds, self.options = architecture, dtype, sae_kinds, options

    def base(self):
        return make_model(self.architecture, self.dtype)

    def config(self, **changes):
        options = dict(self.options)
        if options.get("space") != "dense":
            options["sae"] = [make_sae(kind, seed=seed) for seed, kind in enumerate(self.sae_kinds)]
        elif "sae" in changes:
            options["space"] = "sae"
        return YaPOConfig(**{"layers": [2], "task_type": "CAUSAL_LM"} | options | changes)

    def model(self, adapter_name="default", **changes):
        model = get_peft_model(self.base(), self.config(**changes), adapter_name=adapter_name)
        set_code(model, random_code(), adapter_name)
        return model.eval()


@pytest.fixture
def row(architecture, kind):
    return Row(architecture, **kind)


def run(model, ids=None, **inputs):
    """Logits of a text whose second part is an answer, so that every kind of position is steered somewhere."""
    ids = random_ids() if ids is None else ids
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    with torch.no_grad():
        return model(input_ids=ids, labels=labels, **inputs).logits


def codes(model, adapter_name="default"):
    return [layer.yapo_code[adapter_name].detach() for layer in steered_layers(model)]


@pytest.mark.feature("PEFT", "Attributes: `config`, `device`, `dtype`, `peft_type`, `active_adapter`")
def test_attributes(row):
    model, base = row.model(), row.base()
    assert model.config is model.base_model.model.config
    assert (model.device, model.dtype) == (base.device, base.dtype)
    assert model.peft_type.value == "YAPO"
    assert model.active_adapter == "default"
    assert hasattr(model, "base_model")
    assert type(model.get_base_model()) is type(base)


@pytest.mark.feature("PEFT", "Config saved as JSON and read back by `PeftConfig.from_pretrained`")
def test_config_survives_json(row, tmp_path):
    config = row.model().peft_config["default"]
    config.save_pretrained(tmp_path)
    json.loads((tmp_path / "adapter_config.json").read_text())
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is YaPOConfig
    assert loaded.to_dict() == config.to_dict() | {"inference_mode": loaded.inference_mode}


@pytest.mark.feature("PEFT", "Adapter names that contain each other, or parts of the prefix")
@pytest.mark.filterwarnings("ignore:Adapter name '.*' should not be contained in the prefix")
@pytest.mark.combine(name=["yapo_", "apo", "code", "default2", "layer"])
def test_adapter_names(row, name, tmp_path):
    model = row.model(name)
    longer = f"{name}_{name}"
    model.add_adapter(longer, row.config())
    set_code(model, random_code(seed=7), longer)
    expected = {}
    for adapter in (name, longer):
        model.set_adapter(adapter)
        expected[adapter] = run(model)
    model.save_pretrained(tmp_path)
    for adapter in (name, longer):
        loaded = PeftModel.from_pretrained(row.base(), tmp_path / adapter, adapter_name=adapter)
        assert torch.equal(run(loaded), expected[adapter])


@pytest.mark.feature(
    "PEFT",
    "Adapter names with dots, numbers, and parts of the layers' own names",
    refused="PEFT cannot tell their parameters apart",
)
@pytest.mark.filterwarnings("ignore:Adapter name '.*' should not be contained in the prefix")
@once
@pytest.mark.parametrize("name", ["a.b", "2", "yapo", "yapo_code", "base_model", "keys", "__base__"])
def test_adapter_names_that_peft_would_mix_up_are_refused(row, name):
    with pytest.raises(ConfigError, match=f"adapter_name='{re.escape(name)}' cannot name an adapter"):
        get_peft_model(row.base(), row.config(), adapter_name=name)


@pytest.mark.feature("PEFT", "Save and load: selected adapters, subfolders, safetensors only")
def test_save_selected_adapters(row, tmp_path):
    model = row.model()
    model.add_adapter("other", row.config())
    set_code(model, random_code(seed=7), "other")
    model.set_adapter("other")
    expected = run(model)
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    assert {path.name for path in tmp_path.iterdir()} == {"other", "README.md"}
    assert {path.name for path in (tmp_path / "other").iterdir()} == FILES
    loaded = PeftModel.from_pretrained(row.base(), tmp_path, subfolder="other")
    assert torch.equal(run(loaded), expected)


@pytest.mark.feature("PEFT", "`low_cpu_mem_usage`, `torch_device`, `is_trainable`, `autocast_adapter_dtype`")
@pytest.mark.combine(
    options={
        "plain": {},
        "low_cpu_mem_usage": {"low_cpu_mem_usage": True},
        "is_trainable": {"is_trainable": True},
        "autocast_adapter_dtype": {"autocast_adapter_dtype": False},
        "torch_device": {"torch_device": "cpu"},
    }
)
def test_load_options(row, options, tmp_path):
    model = row.model()
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    loaded = PeftModel.from_pretrained(row.base(), tmp_path, **options)
    assert torch.equal(run(loaded), run(model))
    assert all(code.dtype == torch.float32 for code in codes(loaded))
    trainable = [name for name, parameter in loaded.named_parameters() if parameter.requires_grad]
    assert len(trainable) == (len(codes(model)) if options.get("is_trainable") else 0)


@pytest.mark.feature("PEFT", "`ephemeral_gpu_offload`", refused="PEFT offers it for DoRA only, and warns")
def test_ephemeral_gpu_offload_changes_nothing(row, tmp_path):
    model = row.model()
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="Ephemeral GPU offloading is not supported"):
        loaded = PeftModel.from_pretrained(row.base(), tmp_path, ephemeral_gpu_offload=True)
    assert torch.equal(run(loaded), run(model))


@pytest.mark.feature("PEFT", "`AutoPeftModelForCausalLM.from_pretrained` from a folder")
def test_auto_class(row, tmp_path):
    row.base().save_pretrained(tmp_path / "base")
    base = type(row.base()).from_pretrained(tmp_path / "base", dtype=row.dtype)
    model = get_peft_model(base, row.config()).eval()
    set_code(model, random_code())
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=row.dtype)
    assert torch.equal(run(loaded), run(model))


@pytest.mark.feature("PEFT", "Several adapters: load, set and delete, active, inactive and unknown")
@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted")
def test_several_adapters(row, tmp_path):
    other = row.model(layers=[3], sae=make_sae("gated", seed=9))
    other.save_pretrained(tmp_path)
    model = row.model()
    expected = run(model)
    model.load_adapter(tmp_path, "other")
    assert torch.equal(run(model), expected)
    model.set_adapter("other")
    assert torch.equal(run(model), run(other))
    model.set_adapter("default")
    model.delete_adapter("other")
    assert "other" not in model.peft_config
    assert torch.equal(run(model), expected)
    for call in (model.set_adapter, model.delete_adapter):
        with pytest.raises(ValueError, match="other"):
            call("other")
    model.load_adapter(tmp_path, "other")
    model.set_adapter("other")
    model.delete_adapter("other")
    assert model.active_adapters == ["default"]
    assert torch.equal(run(model), expected)
    model.delete_adapter("default")
    assert torch.equal(run(model.base_model.model), run(row.base()))


@pytest.mark.feature("PEFT", "`disable_adapter` and `unload` give back the base model to the last bit")
def test_disable_and_unload(row):
    model, expected = row.model(), run(row.base())
    assert not torch.equal(run(model), expected)
    with model.disable_adapter():
        assert torch.equal(run(model), expected)
    base = model.unload()
    assert torch.equal(run(base), expected)
    assert set(base.state_dict()) == set(row.base().state_dict())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())
    assert torch.equal(run(copy.deepcopy(base)), expected)
    assert torch.equal(run(pickle.loads(pickle.dumps(base))), expected)
    assert torch.equal(run(get_peft_model(base, row.config()).eval()), expected)


@pytest.mark.feature("PEFT", "`copy.deepcopy` and `pickle` of a steered model")
@pytest.mark.combine(duplicate={"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))})
def test_copies_are_independent(row, duplicate):
    model = row.model()
    expected, copied = run(model), duplicate(model)
    assert torch.equal(run(copied), expected)
    set_code(copied, torch.zeros(D_SAE))
    assert torch.equal(run(copied), run(row.base()))
    assert torch.equal(run(model), expected)
    assert torch.equal(run(copied.unload()), run(row.base()))


@pytest.mark.feature("PEFT", "`get_base_model_state_dict`")
def test_base_model_state_dict(row):
    state, base = get_base_model_state_dict(row.model()), row.base().state_dict()
    assert set(state) == set(base)
    assert all(torch.equal(state[name], base[name]) for name in base)


@pytest.mark.feature("PEFT", "Training moves the codes and nothing else")
def test_training_moves_only_codes(row):
    model = row.model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = random_ids()
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    model(input_ids=ids, labels=labels).loss.backward()
    optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if ".yapo_code." in name}


@pytest.mark.feature("PEFT", "Gradient checkpointing, reentrant and not")
@pytest.mark.combine(use_reentrant=[True, False])
def test_gradient_checkpointing(row, use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = row.model().train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            getattr(model.base_model.model, f"{CHECKPOINTING}_enable")({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        ids = random_ids()
        if checkpointing and REPEATS_HOOKS:
            with (
                pytest.raises(UnsupportedOperationError, match="runs the hooks of a layer again"),
                steering(model, -1.0),
            ):
                pass
            return
        with steering(model, -1.0):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        # The multiplier of the forward pass counts, not the one that holds when the backward pass recomputes blocks.
        loss.backward()
        gradients.append(torch.cat([layer.yapo_code["default"].grad for layer in steered_layers(model)]))
    assert gradients[0].any()
    torch.testing.assert_close(*gradients)


@pytest.mark.feature("PEFT", "`generate` with positional and keyword arguments, sampling, beams, several answers")
@pytest.mark.combine(
    options={
        "greedy": {},
        "sampling": {"do_sample": True, "top_k": 5},
        "beams": {"num_beams": 3},
        "answers": {"num_beams": 2, "num_return_sequences": 2},
    }
)
def test_generate(row, options):
    model, base, ids = row.model(), row.base(), random_ids(2, PROMPT)
    mask, results = torch.ones_like(ids), []
    for arguments in (((ids,), {}), ((), {"input_ids": ids}), ((), {"inputs": ids})):
        torch.manual_seed(0)
        results.append(model.generate(*arguments[0], **arguments[1], attention_mask=mask, **GENERATE | options))
    assert all(torch.equal(result, results[0]) for result in results)
    with steering(model, 0):
        torch.manual_seed(0)
        unsteered = model.generate(ids, attention_mask=mask, **GENERATE | options)
    torch.manual_seed(0)
    assert torch.equal(unsteered, base.generate(ids, attention_mask=mask, **GENERATE | options))


@pytest.mark.feature("PEFT", "Assisted generation, with a draft model and by prompt lookup")
@pytest.mark.combine(kind=EXACT, assistant=["other model", "same model", "prompt lookup"])
def test_assisted_generation(row, assistant):
    model, ids = row.model(), random_ids(1, PROMPT)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **GENERATE}
    if assistant == "prompt lookup":
        helper = {"prompt_lookup_num_tokens": 2}
    else:
        draft = make_model(row.architecture, seed=5 if assistant == "other model" else 0)
        draft.generation_config.eos_token_id = None
        helper = {"assistant_model": draft}
    assert torch.equal(model.generate(**inputs, **helper), model.generate(**inputs))


@pytest.mark.feature("PEFT", "`inputs_embeds`, in forward and `generate`")
def test_inputs_embeds(row):
    model, ids = row.model(), random_ids(2, PROMPT)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(input_ids=ids).logits)
    mask = torch.ones_like(ids)
    from_embeds = model.generate(inputs_embeds=embeds, attention_mask=mask, **GENERATE)
    assert torch.equal(from_embeds, model.generate(ids, attention_mask=mask, **GENERATE)[:, PROMPT:])


@pytest.mark.feature("PEFT", "Static caches and prompts fed in chunks")
@pytest.mark.combine(
    kind=EXACT,
    options={
        "static": {"cache_implementation": "static", "disable_compile": True},
        "chunks": {"prefill_chunk_size": 2},
    },
)
def test_caches(row, options):
    model, ids = row.model(), random_ids(2, PROMPT)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **GENERATE}
    assert torch.equal(model.generate(**inputs, **options), model.generate(**inputs))


@pytest.mark.feature("PEFT", "`get_layer_status`, `get_model_status`, `print_trainable_parameters`")
def test_status(row, capsys):
    model = row.model()
    layers = model.get_layer_status()
    assert [status.module_type for status in layers] == ["YaPOLayer"] * len(codes(model))
    assert all(status.requires_grad == {"default": True} for status in layers)
    status = model.get_model_status()
    assert status.trainable_params == sum(code.numel() for code in codes(model))
    assert (status.enabled, status.peft_types) == (True, {"default": "YAPO"})
    model.print_trainable_parameters()
    assert f"trainable params: {status.trainable_params:,}" in capsys.readouterr().out


@pytest.mark.feature("PEFT", "Device maps (`low_cpu_mem_usage` and dispatch by accelerate)")
def test_device_map(row, tmp_path):
    row.base().save_pretrained(tmp_path / "base")
    base = type(row.base()).from_pretrained(tmp_path / "base", dtype=row.dtype, device_map="cpu")
    model = get_peft_model(base, row.config()).eval()
    set_code(model, random_code())
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=row.dtype, device_map="cpu")
    assert torch.equal(run(loaded), run(model))


@pytest.mark.feature("PEFT", "Accelerate's `cpu_offload` and `disk_offload`, before or after the adapter is attached")
@pytest.mark.combine(where=["cpu", "disk"], when=["before", "after"])
def test_offloading(row, tmp_path, where, when):
    model = get_peft_model(row.base(), row.config()).eval()
    set_code(model, random_code())
    expected, unsteered = run(model), run(row.base())
    model.save_pretrained(tmp_path / "adapter")
    model = model if when == "after" else row.base()
    if where == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, tmp_path / "weights", execution_device=torch.device("cpu"))
    if when == "before":
        model = PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert torch.equal(run(model), expected)
    with model.disable_adapter():
        assert torch.equal(run(model), unsteered)
    model.save_pretrained(tmp_path / "again")
    saved, again = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("adapter", "again"))
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[name], again[name]) for name in saved)


@pytest.mark.feature("Beyond PEFT", "A multiplier per row: `multipliers=` in forward and `generate`")
def test_multipliers(row):
    model, ids, multipliers = row.model(), random_ids(3), [-2.0, 0.0, 1.5]
    together = run(model, ids, multipliers=torch.tensor(multipliers))
    answers = model.generate(ids, attention_mask=torch.ones_like(ids), multipliers=multipliers, **GENERATE, num_beams=2)
    for index, multiplier in enumerate(multipliers):
        with steering(model, multiplier):
            alone = run(model, ids)[index]
            # One multiplier for all is folded into a vector, which rounds differently in 16 bits.
            scale = float(alone.abs().max()) if row.dtype != torch.float32 else 1e-3
            torch.testing.assert_close(alone, together[index], rtol=2e-2, atol=2e-2 * scale)
            if row.dtype == torch.float32:
                alone = model.generate(ids, attention_mask=torch.ones_like(ids), **GENERATE, num_beams=2)
                assert torch.equal(answers[index], alone[index])


def test_multipliers_are_repeated_for_beams_wherever_these_are_set(monkeypatch):
    model, ids = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae())).eval(), random_ids(2)
    set_code(model, random_code())
    options = {"attention_mask": torch.ones_like(ids), "multipliers": [-2.0, 1.5]}
    expected = model.generate(ids, **options, **GENERATE, num_beams=3)
    own = GenerationConfig(**GENERATE, num_beams=3)
    assert torch.equal(model.generate(ids, own, **options), expected)
    monkeypatch.setattr(model.base_model.model.generation_config, "num_beams", 3)
    own = GenerationConfig(**GENERATE)
    assert torch.equal(model.generate(ids, generation_config=own, **options), expected)


@pytest.mark.feature("PEFT", 'Mixed batches: `adapter_names=` per row, with `"__base__"`, in forward and `generate`')
def test_mixed_batches(row):
    model, ids = row.model(), random_ids(4)
    model.add_adapter("other", row.config(layers=[3], sae=make_sae("gated", seed=9)))
    set_code(model, random_code(seed=7), "other")
    names = ["other", "__base__", "default", "other"]
    together = run(model, ids, adapter_names=names)
    options = {"attention_mask": torch.ones_like(ids), **GENERATE, "num_beams": 2}
    answers = model.generate(ids, adapter_names=names, **options)
    for index, name in enumerate(names):
        model.set_adapter("default" if name == "__base__" else name)
        with steering(model, 0.0 if name == "__base__" else 1.0):
            alone = run(model, ids)[index]
            # One multiplier for all is folded into a vector, which rounds differently in 16 bits.
            scale = float(alone.abs().max()) if row.dtype != torch.float32 else 1e-3
            torch.testing.assert_close(alone, together[index], rtol=2e-2, atol=2e-2 * scale)
            if row.dtype == torch.float32:
                assert torch.equal(model.generate(ids, **options)[index], answers[index])


@pytest.mark.feature("PEFT", "Mixed batches in training mode", refused="PEFT allows them in inference only")
def test_mixed_batches_in_training_are_refused(row):
    with pytest.raises(ValueError, match="adapter_names= cannot be used in training mode"):
        row.model().train()(random_ids(), adapter_names=["default", "__base__"])


@pytest.mark.feature("PEFT", "The adapter's file")
def test_the_file_holds_only_codes(row, tmp_path):
    row.model().save_pretrained(tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert all(".yapo.yapo_code." in name for name in names)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 4096
