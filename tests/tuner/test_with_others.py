"""Steering beside other adapters, in quantised and in compiled models."""

import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model, prepare_model_for_kbit_training
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from tiny import ARCHITECTURES, make_model, make_sae, random_code, random_ids, set_code
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from yapo_peft import ConfigError, UnsupportedOperationError, YaPOConfig, steering
from yapo_peft.tuner.adapters import steered_layers

# PEFT says so whenever a model already has an adapter, of whatever method.
pytestmark = pytest.mark.filterwarnings(
    "ignore:You are trying to modify a model with PEFT for a second time",
    "ignore:Already found a `peft_config` attribute in the model",
)


def lora():
    return LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)


def inject_lora(model):
    torch.manual_seed(3)
    return inject_adapter_in_model(lora(), model).eval()


def config(**options):
    return YaPOConfig(**{"layers": 2, "sae": make_sae()} | options)


def steer(model, **options):
    steered = get_peft_model(model, config(**options)).eval()
    set_code(steered, random_code())
    return steered


def logits(model, **inputs):
    with torch.no_grad():
        return model(random_ids(), **inputs).logits


@pytest.mark.feature("With LoRA", "LoRA injected first, or a PeftModel with LoRA steered on top")
@pytest.mark.parametrize("nested", [False, True])
def test_lora_before(nested, tmp_path):
    inner = get_peft_model(make_model(), lora()) if nested else inject_lora(make_model())
    inner.eval()
    with_lora = logits(inner)
    model = steer(inner)
    steered = logits(model)
    assert not torch.equal(steered, with_lora)
    with model.disable_adapter():
        assert torch.equal(logits(model), with_lora)
    model.save_pretrained(tmp_path / "steering")
    assert all(".yapo_code." in name for name in load_file(tmp_path / "steering" / "adapter_model.safetensors"))
    # The saved adapter fits the plain model as well.
    assert not torch.equal(logits(PeftModel.from_pretrained(make_model(), tmp_path / "steering")), logits(make_model()))
    base = model.unload()
    assert base is inner
    assert torch.equal(logits(base), with_lora)
    assert type(base.peft_config["default"]) is LoraConfig
    if nested:
        inner.save_pretrained(tmp_path / "lora")
        names = load_file(tmp_path / "lora" / "adapter_model.safetensors")
        assert all(".lora_" in name for name in names)


@pytest.mark.feature("With LoRA", "LoRA injected after, also into the steered layer")
def test_lora_after():
    model = steer(make_model())
    inject_lora(model.base_model.model)
    assert sum(isinstance(module, LoraLayer) for module in model.modules()) == 2 * 4
    with_both = logits(model)
    expected = logits(steer(inject_lora(make_model())))
    assert torch.equal(with_both, expected)


@pytest.mark.feature("With LoRA", "transformers' `add_adapter`, `set_adapter`, `delete_adapter` with both")
@pytest.mark.parametrize("order", [("lora", "steering"), ("steering", "lora")])
def test_both_through_transformers(order, tmp_path):
    model, configs = make_model(), {"lora": lora(), "steering": config()}
    for name in order:
        torch.manual_seed(3)
        model.add_adapter(configs[name], name)
    set_code(model, random_code(), "steering")
    outputs = {}
    for names in ("lora", "steering", ["lora", "steering"]):
        model.set_adapter(names)
        outputs[str(names)] = logits(model)
    model.disable_adapters()
    outputs["none"] = logits(model)
    assert torch.equal(outputs["none"], logits(make_model()))
    assert torch.equal(outputs["steering"], logits(steer(make_model())))
    assert torch.equal(outputs["['lora', 'steering']"], logits(steer(inject_lora(make_model()))))
    model.enable_adapters()
    model.set_adapter("steering")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model(), tmp_path)
    assert torch.equal(logits(loaded), outputs["steering"])
    model.delete_adapter("lora")
    assert torch.equal(logits(model), outputs["steering"])


@pytest.mark.feature("PEFT", "`multipliers=` and `steering` on a model without PeftModel around it")
def test_multipliers_without_peft_model():
    model = make_model()
    model.add_adapter(config())
    set_code(model, random_code())
    both = logits(model, multipliers=[0.0, -1.0])
    with steering(model, -1.0):
        torch.testing.assert_close(both[1], logits(model)[1])
    torch.testing.assert_close(both[0], logits(make_model())[0])
    with pytest.raises(ConfigError, match="is a feature of PeftModel"):
        logits(model, adapter_names=["default", "default"])


@pytest.mark.feature("PEFT", "Models without a language-model head (`task_type`)")
def test_a_headless_model():
    base = AutoModel.from_config(make_model().config).eval()
    with pytest.raises(ConfigError, match="give task_type='FEATURE_EXTRACTION'"):
        get_peft_model(base, config())
    before = base(random_ids()).last_hidden_state
    model = steer(base, task_type="FEATURE_EXTRACTION")
    assert not torch.equal(model(random_ids()).last_hidden_state, before)
    both = model(random_ids(), multipliers=[0.0, 1.0]).last_hidden_state
    torch.testing.assert_close(both[0], before[0])


def quantised(folder, **options):
    pytest.importorskip("bitsandbytes")
    # bitsandbytes' kernels need matrices of at least 64.
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=128, **shape)).save_pretrained(folder)
    config = BitsAndBytesConfig(**options)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)


def test_4_bit_weights_are_not_packed_for_a_kernel_without_a_backward_pass(tmp_path):
    """Only CPUs with AVX512-BF16 pack them; here it is enough that they may not."""
    model = quantised(tmp_path, load_in_4bit=True).eval()
    projection = model.model.layers[3].mlp.up_proj
    projection.support_avx512bf16_for_cpu = True
    frozen = YaPOConfig(layers=2, sae=make_sae(d_in=64), inference_mode=True)
    get_peft_model(model, frozen).unload()
    assert projection.support_avx512bf16_for_cpu
    steered = get_peft_model(model, YaPOConfig(layers=2, sae=make_sae(d_in=64)))
    assert not projection.support_avx512bf16_for_cpu
    steered.unload()
    projection.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(UnsupportedOperationError, match=r"packed the 4-bit weights of 'model\.layers\.3\.mlp"):
        get_peft_model(model, YaPOConfig(layers=2, sae=make_sae(d_in=64)))


@pytest.mark.feature("transformers", "bitsandbytes 8-bit and 4-bit base models")
@pytest.mark.parametrize("options", [{"load_in_8bit": True}, {"load_in_4bit": True}])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_quantised_models(options, tmp_path):
    model = steer(prepare_model_for_kbit_training(quantised(tmp_path, **options)), sae=make_sae(d_in=64))
    with model.disable_adapter():
        base = logits(model)
    assert not torch.equal(logits(model), base)
    model(random_ids()).logits.logsumexp(-1).sum().backward()
    (layer,) = steered_layers(model)
    assert layer.yapo_code["default"].dtype == torch.float32
    assert layer.yapo_code["default"].grad.any()
    assert [name for name, p in model.named_parameters() if p.grad is not None and ".yapo_code." not in name] == []
    set_code(model, random_code().abs())
    with pytest.raises(NotImplementedError, match="quantised"):
        model.merge_and_unload()
    assert torch.equal(logits(model.unload()), base)


@pytest.mark.feature("transformers", "`torch.compile`: steering breaks no graph and changes no logit")
@pytest.mark.combine(architecture=ARCHITECTURES, positions=["all", "completion", "last"])
@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13"), reason="torch 2.9 breaks the graph at PEFT's context managers"
)
def test_compiled_models(architecture, positions):
    torch._dynamo.reset()
    model = steer(make_model(architecture), positions=positions, layers=[1, 2], sae=[make_sae(), make_sae("topk")])
    # GPT-2 names no loss, which transformers logs, and logging breaks the graph.
    model.base_model.model.loss_type = "ForCausalLM"
    labels = random_ids()
    labels[:, :4] = -100
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for multiplier in (1.0, -1.0):
        with steering(model, multiplier), torch.no_grad():
            expected = model(random_ids(), labels=labels).logits
            torch.testing.assert_close(compiled(random_ids(), labels=labels).logits, expected)


@pytest.mark.feature("transformers", "`torch.export` of the steered model")
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_exported_models(architecture):
    model = steer(make_model(architecture))
    exported = torch.export.export(model.base_model.model, (random_ids(),), {"use_cache": False}, strict=False)
    restored = exported.module()(random_ids(), use_cache=False).logits
    torch.testing.assert_close(restored, logits(model))
