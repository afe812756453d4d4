import pytest
import torch
from peft import get_peft_model
from tiny import D_MODEL, make_model, make_sae, trained_codes
from torch.optim import SGD, Adam

from yapo_peft import ConfigError, UnsupportedOperationError, YaPOConfig
from yapo_peft.tuner.adapters import steered_layers

RAW = {"learning_rate_unit": "raw"}
UNIT = {"learning_rate_unit": "activation"}


@torch.no_grad()
def scaled_sae(factor):
    """The same features, counted in other units."""
    sae = make_sae("jumprelu")
    for tensor in (sae.W_enc, sae.b_enc, sae.threshold):
        tensor.mul_(factor)
    sae.W_dec.div_(factor)
    return sae


@torch.no_grad()
def silent_sae():
    """No feature is ever on."""
    sae = make_sae("jumprelu")
    sae.threshold.fill_(1e9)
    return sae


def codes_after(build, factor, out, **options):
    trainer = build(adapter={"sae": scaled_sae(factor)}, out=out, **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trained_codes(trainer.model), losses


@pytest.mark.feature("Training", "One learning rate for SAEs of any scale")
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"adam_epsilon": 1e-2}])
def test_training_does_not_depend_on_the_scale_of_an_sae(build, options):
    options = {"max_steps": 6, "learning_rate": 0.02, **options}
    code, losses = codes_after(build, 1.0, "one", **UNIT, **options)
    for factor in (0.01, 100.0):
        other, other_losses = codes_after(build, factor, f"{factor}", **UNIT, **options)
        torch.testing.assert_close(other / factor, code, rtol=1e-3, atol=1e-5)
        assert other_losses == pytest.approx(losses, rel=1e-3)
    raw, raw_losses = codes_after(build, 100.0, "raw", **RAW, **options)
    assert raw_losses != pytest.approx(losses, rel=1e-3)
    assert float(raw.abs().max()) < 0.2 * 100 * float(code.abs().max())


@pytest.mark.parametrize("space", ["sae", "dense"])
def test_the_unit_is_the_median_over_tokens_of_a_typical_activation(build, space):
    adapter = {} if space == "sae" else {"space": "dense", "sae": None}
    trainer = build(adapter=adapter, **UNIT)
    model, sae, sizes = make_model(), make_sae(), []
    hidden = []
    model.model.layers[2].register_forward_hook(lambda module, args, output: hidden.append(output))
    for row in trainer.train_dataset:
        with torch.no_grad():
            model(input_ids=torch.tensor([row["prompt_ids"] + row["chosen_ids"]]))
        for token in hidden.pop()[0]:
            features = sae.encode(token[None])[0].detach()
            if space == "sae" and (features > 0).any():
                sizes.append(float(features[features > 0].mean()))
            elif space == "dense":
                sizes.append(float(token.norm()) / D_MODEL**0.5)
    assert trainer._units == {(2, "default"): pytest.approx(float(torch.tensor(sizes).median()), rel=1e-4)}


def test_each_layer_has_its_own_unit_and_other_parameters_have_none(build):
    model = get_peft_model(
        make_model(), YaPOConfig(layers=[1, 2], sae=[make_sae(), scaled_sae(10.0)], modules_to_save=["lm_head"])
    )
    trainer = build(model, learning_rate=0.1, weight_decay=0.5, adam_epsilon=1e-4, **UNIT)
    groups = {id(p): group for group in trainer.create_optimizer().param_groups for p in group["params"]}
    for layer in steered_layers(model):
        group, unit = groups.pop(id(layer.yapo_code["default"])), trainer._units[layer.index, "default"]
        decay = 0.5 / unit if group["weight_decay"] else 0.0
        assert (group["lr"], group["eps"], group["weight_decay"]) == pytest.approx((0.1 * unit, 1e-4 / unit, decay))
    assert groups
    assert all((group["lr"], group["eps"]) == (0.1, 1e-4) for group in groups.values())
    one, two = (trainer._units[layer, "default"] for layer in (1, 2))
    assert two > 5 * one


def test_a_resumed_run_keeps_its_units(build):
    options = {"max_steps": 6, "save_steps": 3, "learning_rate": 0.02, **UNIT}
    whole = build(out="whole", **options)
    whole.train()
    half = build(out="half", **options)
    half.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-3")
    assert torch.equal(trained_codes(half.model), trained_codes(whole.model))


@pytest.mark.parametrize("options", [{"cache_activations": True}, {"cache_activations": True, "direction": "both"}])
def test_units_work_with_everything_else(build, tmp_path, options):
    if options.get("cache_activations"):
        options["activation_cache_dir"] = str(tmp_path / "activations")
    plain = {name: value for name, value in options.items() if "cache" not in name}
    codes = []
    for number, chosen in enumerate((options, plain)):
        trainer = build(out=str(number), learning_rate=0.02, **UNIT, **chosen)
        trainer.train()
        codes.append(trained_codes(trainer.model))
    torch.testing.assert_close(codes[0], codes[1], rtol=1e-3, atol=1e-5)


def test_given_optimizer_keeps_its_learning_rates(build):
    model = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae()))
    optimizer = Adam(steered_layers(model)[0].yapo_code.parameters(), lr=0.3)
    trainer = build(model, init={"optimizers": (optimizer, None)}, **UNIT)
    assert trainer._units is None
    trainer.train()
    assert optimizer.param_groups[0]["initial_lr"] == 0.3


def test_rates_of_paged_optimizers_are_in_units_too(build):
    assert build(optim="paged_adamw_8bit", **UNIT)._units is not None


@pytest.mark.parametrize(
    ("options", "adapter", "error", "message"),
    [
        ({"optim": "sgd"}, {}, UnsupportedOperationError, "optim='sgd' is not known to take steps whose size"),
        ({"optim": "adafactor"}, {}, UnsupportedOperationError, "optim='adafactor'"),
        ({}, {"sae": silent_sae()}, ConfigError, "No feature of the SAE at layer 2 is active"),
    ],
)
def test_unsupported_optimizers_and_silent_saes_are_rejected(build, options, adapter, error, message):
    with pytest.raises(error, match=message):
        build(adapter=adapter, **UNIT, **options)


def test_unknown_learning_rate_unit_is_rejected(build):
    with pytest.raises(ConfigError, match="learning_rate_unit='activations': must be one of"):
        build(learning_rate_unit="activations")


def test_raw_rates_take_any_optimizer(build):
    trainer = build(optim="sgd", **RAW)
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, SGD)
