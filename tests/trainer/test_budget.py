"""The budget for the damage of steering: the divergence on neutral text, its bound in training, and calibration."""

import json

import pytest
import torch
from cached import MANY
from peft import PeftModel, get_peft_model
from tiny import ARCHITECTURES, make_model, make_sae, random_code, set_code, trained_codes

from yapo_peft import ConfigError, DatasetError, YaPOConfig, YaPOTrainingConfig, calibrate, steering
from yapo_peft.methods import prune
from yapo_peft.scoring.neutral import NeutralText, neutral_rows, packaged_text
from yapo_peft.scoring.upper_half import UpperHalf

TEXT = ["w1 w5 w9 w2 w30 w31 w7 w8", "w3 w4 w60 w61 w62 w10", "w90 w80 w70 w11 w12"]
DENSE = {"space": "dense", "sae": None}


def make_adapter(architecture="llama", space="sae", **options):
    config = {"layers": 2, "space": space, **options}
    if space == "sae":
        config["sae"] = make_sae()
    model = get_peft_model(make_model(architecture), YaPOConfig(**config))
    set_code(model, random_code(d_sae=len(model.get_parameter(code_of(model))), scale=0.3))
    return model


def code_of(model):
    return next(name for name, parameter in model.named_parameters() if parameter.requires_grad)


def slow_divergence(model, row, tokenizer, multiplier):
    """KL(unsteered || steered) by two whole forward passes."""
    ids = tokenizer(row, return_tensors="pt")["input_ids"]
    with torch.no_grad(), steering(model, 0.0):
        before = model(ids).logits[0].log_softmax(-1)
    with steering(model, multiplier):
        after = model(ids).logits[0].log_softmax(-1)
    return (before.exp() * (before - after)).sum(-1).mean()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("upper", "keep"), [(True, True), (False, True), (False, False)])
def test_divergence_and_gradient_are_those_of_whole_passes(tokenizer, architecture, upper, keep):
    model = make_adapter(architecture)
    half = UpperHalf(model.get_base_model(), 2) if upper else None
    text = NeutralText(model, neutral_rows(TEXT, tokenizer), torch.device("cpu"), half, keep)
    for _ in range(2):  # computed, then known
        found = text.divergence(model, [0, 1, 2], torch.tensor([1.0, -1.0, 0.5]))
    expected = [slow_divergence(model, *args) for args in zip(TEXT, [tokenizer] * 3, [1.0, -1.0, 0.5], strict=True)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-6)
    assert float(found.detach().min()) > 1e-7
    code = model.get_parameter(code_of(model))
    gradients = [torch.autograd.grad(kl, code)[0] for kl in (found.sum(), torch.stack(expected).sum())]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)


def test_divergence_steers_the_tokens_of_the_adapter(tokenizer):
    model = make_adapter(positions="completion")
    text = NeutralText(model, neutral_rows(TEXT, tokenizer), torch.device("cpu"), None)
    everywhere = make_adapter()
    expected = [slow_divergence(everywhere, row, tokenizer, 1.0) for row in TEXT]
    torch.testing.assert_close(text.divergence(model, [0, 1, 2], torch.ones(3)), torch.stack(expected))


def test_packaged_text_starts_with_every_kind():
    rows = packaged_text()
    assert len(rows) >= 400
    kinds = {row["kind"] for row in rows}
    assert {"prose", "chat", "instruction", "question", "code", "language"} == kinds
    assert {row["kind"] for row in rows[:16]} == kinds
    assert len({json.dumps(row) for row in rows}) == len(rows)


def test_chats_are_rendered_by_the_template(tokenizer):
    chat = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert neutral_rows([{"messages": chat}, "w1 w2"], tokenizer) == [ids, tokenizer("w1 w2")["input_ids"]]


@pytest.mark.feature("Training", "`max_kl`: a bound on the damage at multipliers +1 and -1, on neutral text")
@pytest.mark.parametrize("adapter", [{}, DENSE], ids=["sae", "dense"])
@pytest.mark.parametrize("cached", [False, True])
def test_training_stays_within_the_budget(train, adapter, cached, tokenizer):
    options = {"adapter": adapter, "max_steps": 30, "learning_rate": 0.3, "direction": "both"}
    free = train(cached, **options)
    bound = train(cached, **options, max_kl=5e-4, neutral=TEXT)
    damage = bound.model.peft_config["default"].damage
    total = 0.0
    for side, multiplier in (("plus", 1.0), ("minus", -1.0)):
        of_free, of_bound = (
            float(torch.stack([slow_divergence(t.model, row, tokenizer, multiplier) for row in TEXT]).mean().detach())
            for t in (free, bound)
        )
        assert of_free > 2e-3
        total += of_free
        assert of_bound <= 5e-4 * 1.03
        assert damage[side] == pytest.approx(of_bound, rel=1e-3)
    log = [entry for entry in bound.state.log_history if "kl/plus" in entry]
    # Not only scaled at the end: the weight made the last steps stay near the bound.
    assert log[-1]["kl/plus"] + log[-1]["kl/minus"] < total / 2
    assert log[-1]["kl_weight/plus"] > log[0]["kl_weight/plus"]


def test_cached_training_takes_the_same_steps_with_a_budget(train):
    options = {"max_kl": 0.01, "neutral": TEXT, "max_steps": 3}
    codes = [trained_codes(train(cached, **options)) for cached in (False, True)]
    torch.testing.assert_close(codes[0], codes[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", [{"loss_type": "reps"}, {"direction": "example"}])
def test_budget_works_with_other_losses_and_directions(build, loss):
    trainer = build(max_steps=2, max_kl=0.01, neutral=TEXT, **loss)
    trainer.train()
    assert trainer.state.log_history[0]["kl/plus"] == 0
    assert trainer.state.log_history[1]["kl/plus"] > 0


@pytest.mark.feature("Methods", "`calibrate`: multiplier 1 is a stated damage in both directions")
@pytest.mark.parametrize("space", ["sae", "dense"])
@pytest.mark.parametrize("size", [0.02, 20.0])
def test_calibrated_adapters_do_the_stated_damage(tokenizer, space, size):
    model = make_adapter(space=space)
    code = model.get_parameter(code_of(model))
    code.data *= size
    before = code.detach().clone()
    found = calibrate(model, tokenizer, 0.005, dataset=TEXT)
    damage = {}
    for side, multiplier in (("plus", 1.0), ("minus", -1.0)):
        rows = [slow_divergence(model, row, tokenizer, multiplier) for row in TEXT]
        damage[side] = float(torch.stack(rows).mean().detach())
    assert found == model.peft_config["default"].damage == pytest.approx(damage, rel=1e-3)
    if space == "sae":
        assert damage == {"plus": pytest.approx(0.005, rel=0.05), "minus": pytest.approx(0.005, rel=0.05)}
        assert torch.equal(code.sign(), before.sign())
    else:
        assert max(damage.values()) == pytest.approx(0.005, rel=0.05)
        torch.testing.assert_close(code / code.norm(), before / before.norm())


def test_damage_is_saved_and_forgotten_when_the_code_changes(tokenizer, tmp_path):
    model = make_adapter()
    calibrate(model, tokenizer, 0.005, dataset=TEXT)
    model.save_pretrained(tmp_path)
    assert "KL 0.005" in (tmp_path / "README.md").read_text()
    loaded = PeftModel.from_pretrained(make_model(), tmp_path)
    assert loaded.peft_config["default"].damage == pytest.approx(model.peft_config["default"].damage)
    prune(loaded, 3)
    assert loaded.peft_config["default"].damage is None


def test_calibration_leaves_other_adapters_out(tokenizer):
    model = make_adapter()
    alone = calibrate(model, tokenizer, 0.005, dataset=TEXT)
    model.add_adapter("other", YaPOConfig(layers=2, sae=make_sae()))
    set_code(model, random_code(seed=9), "other")
    model.base_model.set_adapter(["default", "other"])
    assert calibrate(model, tokenizer, 0.005, dataset=TEXT, adapter_name="default") == pytest.approx(alone, rel=1e-2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_kl": 0.0}, ConfigError, r"max_kl=0\.0: must be a positive number"),
        ({"adapter_name": "other"}, ConfigError, "adapter_name='other'"),
        ({"dataset": []}, DatasetError, "The neutral text is empty"),
        ({"dataset": "w1 w2"}, DatasetError, "The neutral text is a str: pass a list of texts"),
        ({"dataset": [{"prompt": "w1"}]}, DatasetError, "must be a text, or have 'text' or 'messages'"),
        ({"dataset": ["w1 w2", "w1"]}, DatasetError, "Row 1 of the neutral text has fewer than two tokens"),
    ],
)
def test_calibrate_rejects_bad_arguments(tokenizer, arguments, error, message):
    model = make_adapter()
    with pytest.raises(error, match=message):
        calibrate(model, tokenizer, **{"dataset": TEXT, **arguments})


def test_calibrate_rejects_a_zero_code(tokenizer):
    model = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae()))
    with pytest.raises(ConfigError, match="Adapter 'default' is zero"):
        calibrate(model, tokenizer, dataset=TEXT)


@pytest.mark.parametrize("max_kl", [0.0, -1.0, float("inf"), float("nan")])
def test_config_rejects_bad_bounds(max_kl, tmp_path):
    with pytest.raises(ConfigError, match=r"max_kl=.*: must be a positive number of nats per token"):
        YaPOTrainingConfig(output_dir=str(tmp_path), max_kl=max_kl, use_cpu=True)


def test_neutral_text_without_a_bound_is_rejected(build):
    with pytest.raises(ConfigError, match="neutral_dataset is only read with max_kl or max_features"):
        build(neutral=TEXT, train_dataset=MANY)
