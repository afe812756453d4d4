"""What adapters promise, on the architectures that people use."""

import pytest
import torch
from architectures import ARCHITECTURES, make_architecture, prompt_of
from damage import code_of
from peft import PeftModel, get_peft_model
from tiny import make_sae, random_code, set_code

from yapo_peft import UnsupportedOperationError, YaPOConfig, steering, sweep

MERGEABLE = {"smollm3", "llava"}

pytestmark = pytest.mark.parametrize("name", ARCHITECTURES)


def steer(name, positions="all", code=None):
    model = get_peft_model(make_architecture(name), YaPOConfig(layers=1, sae=make_sae(), positions=positions))
    set_code(model, random_code(scale=3.0) if code is None else code)
    return model.eval()


@torch.no_grad()
def logits(model, given, **options):
    return model(**given, **options).logits


def test_values_are_those_of_the_formula_and_off_is_off(name, tmp_path):
    base, given = make_architecture(name), prompt_of(name)
    unsteered, seen = logits(base, given), {}
    make_sae().save_model(tmp_path / "sae")
    model = get_peft_model(base, YaPOConfig(layers=1, sae_path=str(tmp_path / "sae"))).eval()
    set_code(model, random_code(scale=3.0))
    (layer,) = (module for key, module in model.named_modules() if key.endswith(".yapo"))
    layer.block.register_forward_hook(lambda *_: seen.update(before=_[2]), prepend=True)
    layer.block.register_forward_hook(lambda *_: seen.update(after=_[2]))
    steered = logits(model, given)
    before, after = (value if torch.is_tensor(value) else value[0] for value in (seen["before"], seen["after"]))
    sae = make_sae()
    features = sae.encode(before)
    expected = before + sae.decode((features + layer.yapo_code["default"]).relu()) - sae.decode(features)
    torch.testing.assert_close(after, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(steered, unsteered, atol=1e-3)
    with steering(model, 0.0):
        assert torch.equal(logits(model, given), unsteered)
    with model.disable_adapter():
        assert torch.equal(logits(model, given), unsteered)
    rows = logits(model, given, multipliers=[-1.0, 2.0])
    for row, multiplier in enumerate((-1.0, 2.0)):
        with steering(model, multiplier):
            torch.testing.assert_close(rows[row], logits(model, given)[row], atol=1e-4, rtol=1e-3)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(make_architecture(name), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, given), steered)


@pytest.mark.parametrize("positions", ["all", "completion", "last"])
def test_generation_is_that_of_whole_passes(name, positions):
    model, given = steer(name, positions), prompt_of(name)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    if name == "mamba2" and positions != "all":
        with pytest.raises(UnsupportedOperationError, match="keeps a state instead of a cache"):
            model.generate(**given, **options)
        return
    answer = model.generate(**given, **options, return_dict_in_generate=True)
    length, ids = given["input_ids"].shape[1], answer.sequences
    labels = ids.clone()
    labels[:, :length] = -100
    whole = {**given, "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if "token_type_ids" in given:
        whole["token_type_ids"] = (ids == 120).long()
    found = torch.stack(answer.logits, dim=1)
    torch.testing.assert_close(found, logits(model, whole)[:, length - 1 : -1], atol=2e-3, rtol=1e-2)


def test_training_is_the_same_with_cached_activations(name, build, pairs, tokenizer):
    codes, losses = [], []
    for cached in (False, True):
        model = get_peft_model(make_architecture(name), YaPOConfig(layers=1, sae=make_sae()))
        options = {"cache_activations": cached, "max_steps": 3, "beta": 1.0}
        trainer = build(model, out=f"out-{cached}", **options)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        codes.append(model.get_parameter(code_of(model)).detach())
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0][0] != losses[0][-1]
    torch.testing.assert_close(codes[0], codes[1], atol=2e-3, rtol=1e-2)
    assert sweep(model, pairs, tokenizer, [0.0, 1.0]).table.margin.notna().all()


def test_merging_gives_the_same_logits_or_is_refused(name):
    model, given = steer(name, code=random_code().abs()), prompt_of(name)
    steered = logits(model, given)
    if name not in MERGEABLE:
        with pytest.raises(UnsupportedOperationError, match="cannot be merged"):
            model.merge_and_unload()
        assert torch.equal(logits(model, given), steered)
        return
    torch.testing.assert_close(logits(model.merge_and_unload(), given), steered, atol=1e-4, rtol=1e-3)
