import pytest
import torch
from _reference.yapo import add_vector, completion_logp, steer_block
from cached import HELD_OUT
from peft import get_peft_model
from tiny import D_MODEL, make_model, make_sae, random_code, trained_codes
from torch.nn.functional import logsigmoid

from yapo_peft import ConfigError, UnsupportedOperationError, YaPOConfig
from yapo_peft.trainer.objective import draw_directions
from yapo_peft.tuner.adapters import steered_layers


def slow_reps(batch, code, direction):
    """The loss of arXiv 2505.20809 on an unwrapped model, a pair at a time, and its gradient."""
    code = code.clone().requires_grad_()
    model, losses = make_model(), []
    scored = (batch["input_ids"], batch["completion_mask"])
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        reference = completion_logp(model(**inputs).logits, *scored)
    tokens, pairs = batch["completion_mask"].sum(dim=1), len(direction)
    for pair, sign in enumerate(direction.tolist()):
        if len(code) == D_MODEL:
            handle = add_vector(model.model.layers[2], code, sign)
        else:
            handle = steer_block(model.model.layers[2], code, make_sae(), sign)
        logp = completion_logp(model(**inputs).logits, *scored)
        handle.remove()
        win, lose = (pair, pair + pairs) if sign > 0 else (pair + pairs, pair)
        weight = max(float(reference[lose] - reference[win]), 1.0)
        difference = weight / tokens[win] * logp[win] - logp[lose] / tokens[lose]
        losses.append(-torch.log(torch.sigmoid(difference)))
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.detach(), code.grad


@pytest.mark.feature("Training", "RePS, and your own loss")
@pytest.mark.parametrize("direction", ["batch", "example", "both"])
@pytest.mark.parametrize("space", ["sae", "dense"])
@pytest.mark.parametrize("cached", [False, True])
def test_reps_has_its_loss_and_gradient(build, tmp_path, direction, space, cached):
    code = random_code(0.3) if space == "sae" else random_code(1.0, D_MODEL)
    options = {"cache_activations": True, "activation_cache_dir": str(tmp_path / "cache")} if cached else {}
    adapter = {} if space == "sae" else {"space": "dense", "sae": None}
    trainer = build(adapter=adapter, code=code, loss_type="reps", direction=direction, seed=3, **options)
    trainer.model.train()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradient = steered_layers(trainer.model)[0].yapo_code["default"].grad
    if direction == "both":
        steps = [slow_reps(batch, code, sign * torch.ones(4)) for sign in (1.0, -1.0)]
        expected, expected_gradient = (sum(parts) / 2 for parts in zip(*steps, strict=True))
    else:
        expected, expected_gradient = slow_reps(batch, code, draw_directions(4, direction, 3, 0, 0, 0))
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-4 * float(expected_gradient.abs().max()))


def published(pairs):
    """The default objective, as a custom objective."""
    return -logsigmoid(0.1 * ((pairs.winning - pairs.ref_winning) - (pairs.losing - pairs.ref_losing)))


@pytest.mark.parametrize("direction", ["batch", "example", "both"])
def test_custom_objective_equal_to_the_published_loss_trains_alike(build, direction):
    results = []
    for number, init in enumerate(({}, {"objective": published})):
        init = {**init, "eval_dataset": HELD_OUT}
        trainer = build(out=str(number), init=init, direction=direction, per_device_eval_batch_size=2)
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        metrics = [{k: v for k, v in entry.items() if k != "epoch"} for entry in log]
        results.append((trained_codes(trainer.model), metrics, trainer.evaluate()["eval_loss"]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-6)
    for own, other in zip(results[0][1], results[1][1], strict=True):
        assert own == pytest.approx(other, rel=1e-4, abs=1e-6)
    assert results[0][2] == pytest.approx(results[1][2], rel=1e-5)


def test_reps_trains_and_evaluates(build):
    options = {"max_steps": 20, "learning_rate": 0.01, "direction": "both"}
    trainer = build(train_dataset=HELD_OUT, init={"eval_dataset": HELD_OUT}, loss_type=["reps"], **options)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] == pytest.approx((after["eval_loss/plus"] + after["eval_loss/minus"]) / 2)
    assert after["eval_loss"] < before["eval_loss"] - 0.01


@pytest.mark.parametrize(
    ("options", "init", "error", "message"),
    [
        ({"loss_type": ["reps", "sft"]}, {}, ConfigError, r"\['reps'\] cannot be combined"),
        ({"loss_type": "reps", "label_smoothing": 0.1}, {}, ConfigError, "label_smoothing=0.1 changes TRL's losses"),
        ({"loss_type": "reps", "ld_alpha": 0.5}, {}, ConfigError, "ld_alpha=0.5"),
        ({"loss_type": "reps", "loss_weights": [2.0]}, {}, ConfigError, r"loss_weights=\[2.0\]"),
        (
            {"loss_type": "reps", "reference": "none"},
            {},
            UnsupportedOperationError,
            "compares each answer",
        ),
        ({"loss_type": "hinge"}, {"objective": published}, ConfigError, r"objective= and loss_type=\['hinge'\]"),
        ({"use_weighting": True}, {"objective": published}, ConfigError, "use_weighting=True"),
    ],
)
def test_options_without_effect_are_rejected(build, options, init, error, message):
    with pytest.raises(error, match=message):
        build(init=init, **options)


def test_other_adapters_of_the_model_are_left_alone(build):
    model = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae()))
    model.add_adapter("other", YaPOConfig(layers=1, space="dense"))
    trainer = build(model, loss_type="reps")
    trainer.train()
    codes = {name: code for layer in steered_layers(model) for name, code in layer.yapo_code.items()}
    assert codes["default"].abs().max() > 0
    assert codes["other"].abs().max() == 0
