"""TopK SAEs converted to JumpReLU: thresholds, what is measured, and what the saved adapter does."""

import json
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import D_SAE, make_model, make_sae, random_code, set_code
from torch.testing import assert_close

from yapo_peft import ConfigError, DatasetError, SAEMismatchError, YaPOConfig, steering
from yapo_peft.adapter_file.card import model_card
from yapo_peft.methods import convert_to_jumprelu
from yapo_peft.methods.jumprelu import fit_thresholds
from yapo_peft.sae import loader
from yapo_peft.tuner.adapters import record_damage, steered_layers
from yapo_peft.tuner.hooks import block_outputs

TEXTS = [" ".join(f"w{(7 * row + 3 * place + row * place) % 50}" for place in range(12)) for row in range(24)]


def adapter(kind="topk", **options):
    model = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae(kind), **options)).eval()
    set_code(model, random_code(0.2))
    return model


def logits(model, ids, multiplier):
    with torch.no_grad(), steering(model, multiplier):
        return model(torch.tensor([ids])).logits[0]


def test_thresholds_have_the_least_error_of_all():
    torch.manual_seed(0)
    values = torch.randn(40, 8).round(decimals=1)  # some are equal
    active = (values > 0) & (values + torch.randn(40, 8) > 0.5)
    active[:, 0] = False
    found = fit_thresholds(values, active)

    def error(thresholds):
        return (((values > thresholds) != active) * values.relu()).sum(0)

    candidates = torch.cat([torch.zeros(1, 8), values.relu()])
    least = torch.stack([error(candidate) for candidate in candidates]).amin(0)
    assert_close(error(found), least)
    assert (values[:, 0] <= found[0]).all()


@pytest.mark.feature("SAEs", "`convert_to_jumprelu`: adapters of TopK SAEs, self-contained for both signs")
def test_a_converted_adapter_steers_in_both_directions_without_its_sae(tmp_path, tokenizer, monkeypatch):
    model = adapter()
    (layer,) = steered_layers(model)
    sae = layer.yapo_sae["default"]
    found = convert_to_jumprelu(model, tokenizer, TEXTS)
    assert layer.yapo_sae["default"].activation == "jumprelu"
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(loader, "_registered", {})
    loaded = PeftModel.from_pretrained(make_model(), tmp_path).eval()
    for sign in (1, -1):
        assert_close(logits(loaded, [5, 6, 7, 8], sign), logits(model, [5, 6, 7, 8], sign), rtol=1e-5, atol=1e-5)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 40_000

    # What it measured is what a reader would, on every fourth row.
    code, kl, wrong, either, error, total = layer.code("default").detach(), {1: [], -1: []}, 0, 0, 0.0, 0.0
    for text in TEXTS[::4]:
        ids = tokenizer(text)["input_ids"]
        with torch.no_grad(), steering(model, 0.0), block_outputs([layer]) as outputs:
            model(torch.tensor([ids]))
        kinds = (sae, layer.yapo_sae["default"])
        cpu = torch.device("cpu")
        features = [each.weights(cpu, torch.float32).encode(outputs[2][0])[0][:, code != 0] for each in kinds]
        error, total = error + float((features[0] - features[1]).abs().sum()), total + float(features[0].sum())
        topk, jump = (each > 0 for each in features)
        wrong, either = wrong + int((topk ^ jump).sum()), either + int((topk | jump).sum())
        for sign in (1, -1):
            both = []
            for each in kinds:
                layer.yapo_sae["default"] = each
                both.append(logits(model, ids, sign).log_softmax(-1))
            kl[sign].append((both[0].exp() * (both[0] - both[1])).sum(-1))
    assert 0 < found["differ"] < 0.5
    assert found["differ"] == pytest.approx(wrong / either)
    assert found["error"] == pytest.approx(error / total, rel=1e-4)
    assert found["kl_plus"] == pytest.approx(float(torch.cat(kl[1]).mean()), rel=1e-3)
    assert found["kl_minus"] == pytest.approx(float(torch.cat(kl[-1]).mean()), rel=1e-3)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["conversion"] == found
    assert config["sae_identity"][0]["architecture"] == "jumprelu"
    assert f"{100 * found['differ']:.1f} % of the code's active features are not active" in str(model_card(model))


def test_training_a_converted_adapter_says_what_to_do(tmp_path, tokenizer, sae_folder):
    model = get_peft_model(make_model(), YaPOConfig(layers=2, sae_path=sae_folder("topk"))).eval()
    set_code(model, random_code(0.2))
    convert_to_jumprelu(model, tokenizer, TEXTS)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(make_model(), tmp_path / "adapter", is_trainable=True)
    with pytest.raises(SAEMismatchError, match="was converted to JumpReLU for its own code"):
        loaded(torch.tensor([[5, 6, 7]]))


def test_damage_that_was_measured_is_measured_again(tokenizer):
    model = adapter()
    layer, config = steered_layers(model)[0], model.peft_config["default"]
    record_damage(model, "default", [layer], {"plus": 9.0, "minus": 9.0})
    convert_to_jumprelu(model, tokenizer, TEXTS)
    assert 0 < config.damage["plus"] < 9
    assert config.damage["plus"] != config.damage["minus"]


def test_what_cannot_be_converted_is_named_and_left_alone(tokenizer):
    model = adapter()
    sae = steered_layers(model)[0].yapo_sae["default"]
    with pytest.raises(DatasetError, match="has 3 rows: at least 4 are needed"):
        convert_to_jumprelu(model, tokenizer, TEXTS[:3])
    assert steered_layers(model)[0].yapo_sae["default"] is sae
    assert model.peft_config["default"].conversion is None
    set_code(model, torch.zeros(D_SAE))
    for other in (model, adapter("jumprelu")):
        with pytest.raises(ConfigError, match="has no TopK SAE with a non-zero code"):
            convert_to_jumprelu(other, tokenizer, TEXTS)
    with pytest.raises(ConfigError, match=r"conversion=.*convert_to_jumprelu fills it in"):
        YaPOConfig(layers=2, sae=make_sae(), conversion={"differ": 0.1})


def test_an_adapter_of_several_saes_converts_those_of_topk(tmp_path, tokenizer):
    model = get_peft_model(make_model(), YaPOConfig(layers=[2, 1], sae=[make_sae(), make_sae("topk")])).eval()
    set_code(model, random_code(0.2))
    second = steered_layers(model)[1].yapo_sae["default"]
    convert_to_jumprelu(model, tokenizer, TEXTS)
    assert steered_layers(model)[1].yapo_sae["default"] is second
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no encoder is carried
        model.save_pretrained(tmp_path)
    identities = json.loads((tmp_path / "adapter_config.json").read_text())["sae_identity"]
    assert [identity["architecture"] for identity in identities] == ["jumprelu", "jumprelu"]
    loaded = PeftModel.from_pretrained(make_model(), tmp_path)
    for before, after in zip(steered_layers(model), steered_layers(loaded), strict=True):
        assert torch.equal(before.yapo_code["default"], after.yapo_code["default"])
