"""What only an accelerator can show; the same tests run for CUDA and MPS."""

import pytest
import torch
from peft import get_peft_model
from tiny import ARCHITECTURES, make_model, make_sae, preference_rows, random_code, random_ids, set_code, trained_codes

from yapo_peft import YaPOConfig, YaPOTrainer, YaPOTrainingConfig, steering
from yapo_peft.tuner.adapters import steered_layers

AVAILABLE = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
DEVICES = [
    pytest.param(name, marks=pytest.mark.skipif(not there, reason=f"needs {name}")) for name, there in AVAILABLE.items()
]


def adapter():
    return YaPOConfig(layers=[1, 2], sae=[make_sae(), make_sae("topk")])


def steered(architecture="llama", dtype=torch.float32):
    model = get_peft_model(
        make_model(architecture, dtype), YaPOConfig(layers=[1, 2], sae=[make_sae(), make_sae("topk")])
    )
    set_code(model, random_code())
    return model.eval()


@pytest.mark.feature("Devices", "Logits and gradients on CUDA and MPS, in fp32, bf16 and fp16", needs="such a device")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_and_gradients_are_those_of_the_cpu(device, dtype, architecture):
    results = []
    for place in ("cpu", device):
        model, ids = steered(architecture, dtype).to(place), random_ids().to(place)
        with steering(model, -0.5):
            output = model(ids, labels=ids)
        output.loss.backward()
        gradients = [layer.yapo_code["default"].grad.cpu() for layer in steered_layers(model)]
        results.append((output.logits.detach().float().cpu(), torch.stack(gradients)))
    rounding = {torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 2e-2}[dtype]
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=rounding, atol=rounding * float(expected.abs().max()))


@pytest.mark.feature("Devices", "Training on CUDA and MPS", needs="such a device")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cached", [False, True])
def test_training_gives_the_codes_of_the_cpu(device, cached, tokenizer, tmp_path):
    from datasets import Dataset

    codes = []
    for use_cpu in (True, False):
        model = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae()))
        cache = (
            {"cache_activations": True, "activation_cache_dir": str(tmp_path / f"cache-{use_cpu}")} if cached else {}
        )
        args = YaPOTrainingConfig(
            output_dir=str(tmp_path / str(use_cpu)), max_steps=4, learning_rate=0.1, learning_rate_unit="raw",
            warmup_steps=0, direction="both", report_to="none", save_strategy="no", bf16=False, use_cpu=use_cpu,
            **cache,
        )  # fmt: skip
        trainer = YaPOTrainer(
            model, args, train_dataset=Dataset.from_list(preference_rows()), processing_class=tokenizer
        )
        trainer.train()
        codes.append(trained_codes(trainer).cpu())
    torch.testing.assert_close(codes[1], codes[0], rtol=1e-2, atol=1e-3)


@pytest.mark.feature("Devices", "A model over several GPUs (`device_map`)", needs="two GPUs")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_over_several_gpus(tmp_path):
    from transformers import AutoModelForCausalLM

    make_model().save_pretrained(tmp_path)
    places = {"model.embed_tokens": 0, "model.norm": 1, "model.rotary_emb": 0, "lm_head": 1}
    places |= {f"model.layers.{i}": i // 2 for i in range(4)}
    base = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places)
    model = get_peft_model(base, adapter()).eval()
    set_code(model, random_code())
    assert [layer.yapo_code["default"].device.index for layer in steered_layers(model)] == [0, 1]
    with torch.no_grad():
        got, expected = model(random_ids().to(0)).logits.cpu(), steered()(random_ids()).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
