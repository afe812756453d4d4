"""Training with few features: how they are chosen, that all others stay at zero, and bad values."""

import itertools

import pytest
import torch
from _reference.yapo import add_vector, completion_logp
from cached import MANY
from peft import get_peft_model
from tiny import D_MODEL, D_SAE, make_model, make_sae, random_code, trained_codes

from yapo_peft import ConfigError, NonFiniteLossError, YaPOConfig
from yapo_peft.scoring.neutral import NeutralText, neutral_rows
from yapo_peft.steering.selection import Metric, select_features
from yapo_peft.trainer.selection import damage_metric, shifted
from yapo_peft.tuner.adapters import steered_layers

TEXT = ["w1 w5 w9 w2 w30 w31 w7 w8", "w3 w4 w60 w61 w62 w10", "w90 w80 w70 w11 w12"]


def problem(features=7, width=5):
    torch.manual_seed(0)
    metric, decoder = Metric(torch.randn(width, width), 1.0), torch.randn(features, width)
    energies = ((decoder @ full(metric)) * decoder).sum(dim=1)
    return torch.randn(width), metric, decoder, energies


def full(metric):
    return metric.factor.T @ metric.factor + metric.ridge * torch.eye(metric.factor.shape[1])


def select(gain, metric, decoder, energies, k):
    return select_features(gain, metric, lambda vector: decoder @ vector, energies, lambda index: decoder[index], k)


def value(gain, metric, shift):
    return float(gain @ shift - shift @ full(metric) @ shift / 2)


def best_by_search(gain, metric, decoder, k):
    """The most that non-negative weights of any `k` rows gain, each set solved by projected gradient descent."""
    best = 0.0
    for rows in itertools.combinations(range(len(decoder)), k):
        weights = torch.zeros(k)
        for _ in range(3000):
            slope = decoder[list(rows)] @ (gain - full(metric) @ (weights @ decoder[list(rows)]))
            weights = (weights + 0.005 * slope).clamp(min=0)
        best = max(best, value(gain, metric, weights @ decoder[list(rows)]))
    return best


@pytest.mark.parametrize("k", [1, 2])
def test_selection_finds_the_best_features(k):
    gain, metric, decoder, energies = problem()
    chosen, weights = select(gain, metric, decoder, energies, k)
    assert (weights > 0).all()
    assert len(chosen) <= k
    assert value(gain, metric, weights @ decoder[chosen]) == pytest.approx(
        best_by_search(gain, metric, decoder, k), 1e-3
    )


def test_selection_skips_features_with_infinite_energy():
    gain, metric, decoder, energies = problem()
    first = select(gain, metric, decoder, energies, 1)[0]
    energies[first] = torch.inf
    assert int(first) not in select(gain, metric, decoder, energies, 7)[0].tolist()


@pytest.mark.parametrize("kind", ["random", "equal", "one", "zero"])
def test_a_metric_is_the_shrunk_second_moment(kind):
    samples = {"random": torch.randn(5, 9), "equal": torch.ones(4, 9), "one": torch.randn(1, 9)}
    samples = samples.get(kind, torch.zeros(3, 9))
    metric = Metric.of(samples)
    moment, identity = samples.T @ samples / len(samples), torch.eye(9)
    scale = moment.diagonal().mean()
    distance = float((moment - scale * identity).square().sum())
    noise = sum((torch.outer(x, x) - moment).square().sum() for x in samples) / len(samples) ** 2
    share = min(max(float(noise) / distance, 0.01), 1.0) if distance > 0 else 1.0
    expected = (1 - share) * moment + share * scale * identity if kind != "zero" else identity
    torch.testing.assert_close(full(metric), expected)
    vectors = torch.randn(2, 9)
    torch.testing.assert_close(metric.product(vectors), vectors @ expected)
    part = slice(2, 6)
    torch.testing.assert_close(
        metric.energies(vectors[:, part], part), ((vectors[:, part] @ expected[part, part]) * vectors[:, part]).sum(1)
    )
    torch.testing.assert_close(metric.solve(expected @ vectors[0]), vectors[0], rtol=1e-3, atol=1e-3)


def test_metric_is_the_second_derivative_of_the_divergence(tokenizer, monkeypatch):
    monkeypatch.setattr(Metric, "of", lambda samples: samples.T @ samples / len(samples))
    model = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae()))
    text = NeutralText(model, neutral_rows(TEXT, tokenizer), torch.device("cpu"), None)
    layers = [(steered_layers(model)[0], "default")]
    metrics = [damage_metric(layers, [D_MODEL], text, seed) for seed in range(300)]
    estimated = torch.stack(metrics).mean(dim=0)
    direction = torch.randn(D_MODEL)
    direction *= 0.02 / direction.norm()
    found = []
    for row in TEXT:
        ids = tokenizer(row, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            before = model(ids).logits[0].double().log_softmax(-1)
            with shifted(layers, [direction[None, None]]):
                after = model(ids).logits[0].double().log_softmax(-1)
        found.append((before.exp() * (before - after)).sum(-1).mean())
    predicted = float(direction @ estimated @ direction / 2)
    assert predicted == pytest.approx(float(torch.stack(found).mean()), rel=0.15)


@pytest.mark.parametrize("positions", ["completion", "prompt", "last"])
def test_damage_is_that_of_the_tokens_which_the_adapter_steers(tokenizer, positions):
    found = []
    for steered in ("all", positions):
        model = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae(), positions=steered))
        text = NeutralText(model, neutral_rows(TEXT, tokenizer), torch.device("cpu"), None)
        found.append(damage_metric([(steered_layers(model)[0], "default")], [D_MODEL], text, seed=0).factor)
    # Text without prompts is all completion; of adapters that steer prompts, its first half is the prompt.
    assert torch.allclose(*found) == (positions != "prompt")
    assert float(found[1].norm()) > 0.1 * float(found[0].norm())


@pytest.mark.feature("Training", "`max_features`: few features, chosen for their gain and damage before training")
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("layers", [2, [1, 3]])
def test_chosen_features_are_the_only_ones_that_train(train, layers, cached):
    saes = [make_sae(seed=seed) for seed in range(len(layers) if isinstance(layers, list) else 1)]
    options = {"adapter": {"layers": layers, "sae": saes}, "max_steps": 5, "max_features": 7, "learning_rate": 1e-3}
    trainer = train(cached, **options, neutral=TEXT)
    code = trained_codes(trainer)
    assert int((code > 0).sum()) == 4
    assert int((code < 0).sum()) == 3
    assert {int(entry["code/nonzero"]) for entry in trainer.state.log_history if "code/nonzero" in entry} == {7}


def test_chosen_features_lower_the_loss_more_than_others(build):
    def first_loss(code=None):
        trainer = build(max_steps=1, learning_rate=0.0, code=code, max_features=6, direction="both", neutral=TEXT)
        trainer.train()
        return trainer.state.log_history[0]["loss"], trained_codes(trainer)[0]

    chosen, code = first_loss()
    others = []
    for seed in range(5):
        moved = torch.zeros(D_SAE)
        moved[torch.randperm(D_SAE, generator=torch.Generator().manual_seed(seed))[:6]] = code[code != 0]
        others.append(first_loss(moved)[0])
    assert chosen < min(others)


def test_resumed_training_keeps_the_features_bit_for_bit(build, tmp_path):
    options = {"train_dataset": MANY, "max_steps": 8, "save_steps": 4, "max_features": 6, "max_kl": 0.01}
    whole = build(**options, neutral=TEXT)
    whole.train()
    resumed = build(out="resumed", **options, neutral=TEXT)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert torch.equal(trained_codes(resumed), trained_codes(whole))
    assert resumed.state.stateful_callbacks["DamageBound"] == whole.state.stateful_callbacks["DamageBound"]


@pytest.mark.parametrize(("first", "second"), [(None, 6), (6, None), (6, 8)])
def test_another_number_of_features_does_not_resume(build, tmp_path, first, second):
    options = {"train_dataset": MANY, "max_steps": 2, "save_steps": 1}
    build(**options, max_features=first, neutral=None if first is None else TEXT).train()
    resumed = build(out="resumed", **options, max_features=second, neutral=None if second is None else TEXT)
    with pytest.raises(ConfigError, match=f"max_features={second}, and the checkpoint .* max_features={first}:"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3"])
@pytest.mark.parametrize("rows", [TEXT, TEXT[:1], TEXT[:1] * 8], ids=["few", "one", "equal"])
def test_training_starts_within_the_bound(build, architecture, rows):
    trainer = build(architecture, max_steps=1, learning_rate=0.0, max_features=6, max_kl=0.05, neutral=rows)
    trainer.train()
    log = trainer.state.log_history[0]
    # Two of the rows that the mean over all of them is bounded for.
    assert 0 < max(log["kl/plus"], log["kl/minus"]) < 0.05 * len(set(rows)) * 1.1
    assert log["code/nonzero"] == 6
    assert max(trainer.model.peft_config["default"].damage.values()) > 0.005


def test_bounded_training_of_all_features_starts_on_more_than_a_few(build):
    def first(**options):
        trainer = build(max_steps=2, learning_rate=0.0, max_kl=0.05, direction="both", neutral=TEXT, **options)
        trainer.train()
        return trainer.state.log_history[0]

    few, many = first(max_features=6), first()
    assert many["code/nonzero"] > 6
    assert many["loss/preference"] < few["loss/preference"]
    assert 0 < max(many["kl/plus"], many["kl/minus"]) < 0.05 * len(TEXT) * 1.1


@pytest.mark.parametrize("cached", [False, True])
def test_bounded_training_of_a_vector_starts_from_the_best_shift(train, pairs, cached):
    options = {"adapter": {"space": "dense", "sae": None}, "max_steps": 1, "learning_rate": 0.0, "max_kl": 0.01}
    trainer = train(cached, **options, train_dataset=pairs, neutral=TEXT, per_device_train_batch_size=len(pairs))
    metric = damage_metric([(steered_layers(trainer.model)[0], "default")], [D_MODEL], trainer._text, trainer.args.seed)
    batch = trainer._collated(list(trainer.train_dataset))
    vector, model = torch.zeros(D_MODEL, requires_grad=True), make_model()
    add_vector(model.model.layers[2], vector, 1.0)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    chosen, rejected = completion_logp(logits, batch["input_ids"], batch["completion_mask"]).chunk(2)
    (chosen - rejected).mean().backward()
    gain = metric.product(trained_codes(trainer)[0])
    assert float(torch.cosine_similarity(gain, vector.grad, dim=0)) > 0.9999
    assert max(trainer.model.peft_config["default"].damage.values()) > 0.005


def test_codes_and_vectors_trained_together_start_from_zero(build):
    model = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae()))
    model.add_adapter("vector", YaPOConfig(layers=2, space="dense"))
    model.base_model.set_adapter(["default", "vector"])
    trainer = build(model=model, max_steps=1, learning_rate=0.0, max_kl=0.01, neutral=TEXT)
    trainer.train()
    assert trainer.state.log_history[0]["code/nonzero"] == 0
    for name in ("default", "vector"):
        assert trainer.model.peft_config[name].damage == {"plus": 0.0, "minus": 0.0}


def test_codes_of_one_layer_start_together(build):
    model = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae()))
    model.add_adapter("second", YaPOConfig(layers=2, sae=make_sae(seed=1)))
    model.base_model.set_adapter(["default", "second"])
    build(model=model, max_steps=1, learning_rate=0.0, max_kl=0.01, neutral=TEXT).train()
    layer = steered_layers(model)[0]
    assert all(bool(layer.yapo_code[name].any()) for name in ("default", "second"))


def test_a_start_that_overflows_is_an_error(build):
    trainer = build(max_steps=1, max_kl=0.01, neutral=TEXT)
    trainer._base_model.model.layers[3].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteLossError, match="gradient of the unsteered model is NaN"):
        trainer.train()


def test_codes_that_steer_no_token_have_no_features(build):
    trainer = build(adapter={"positions": "completion[50:]"}, max_steps=1, max_features=4, neutral=TEXT)
    with pytest.raises(ConfigError, match=r"max_features=4: no feature .* does the adapter steer tokens of them\?"):
        trainer.train()


def test_training_goes_on_with_the_features_of_a_sparse_code(build):
    code = torch.zeros(D_SAE)
    code[[3, 50]] = torch.tensor([0.5, -0.5])
    trainer = build(code=code, max_steps=2, max_features=5, neutral=TEXT)
    trainer.train()
    assert trained_codes(trainer)[0].nonzero().flatten().tolist() == [3, 50]
    assert not torch.equal(trained_codes(trainer)[0], code)


def test_frozen_adapters_keep_their_codes(build):
    model = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae()))
    model.add_adapter("frozen", YaPOConfig(layers=2, sae=make_sae()))
    steered_layers(model)[0].yapo_code["frozen"].data.copy_(random_code())
    trainer = build(model=model, max_steps=2, max_features=3, neutral=TEXT)
    trainer.train()
    assert int(trained_codes(trainer)[0].count_nonzero()) == 3
    assert torch.equal(steered_layers(model)[0].yapo_code["frozen"].data, random_code())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_features": 1}, "max_features=1: must be a whole number, at least 2"),
        ({"code": random_code(), "max_features": 5}, r"max_features=5, and the codes to train have \d+ entries"),
        ({"adapter": {"space": "dense", "sae": None}, "max_features": 5}, "adapter 'default' has space='dense'"),
    ],
)
def test_bad_values_are_rejected(build, options, message):
    with pytest.raises(ConfigError, match=message):
        build(**options)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "reps"])
@pytest.mark.parametrize("cached", [False, True])
def test_one_pass_gives_the_gradients_of_both_directions(build, cached, loss, tmp_path, monkeypatch):
    cache = {"cache_activations": True, "activation_cache_dir": str(tmp_path)} if cached else {}
    trainer = build(max_features=4, neutral=TEXT, loss_type=loss, **cache)
    passes, gradient = [], torch.autograd.grad

    def counted(outputs, inputs, *args, **kwargs):
        passes.append(isinstance(inputs, list))
        return gradient(outputs, inputs, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    layers = [(steered_layers(trainer.model)[0], "default")]
    examples = [trainer.train_dataset[index] for index in range(4)]

    def gradients():
        shift = torch.zeros(1, 1, D_MODEL, requires_grad=True)
        return trainer._gradients_of_shifts(examples, [shift], shifted(layers, [shift]))

    found = gradients()
    assert sum(passes) == (2 if loss == "reps" else 1)
    monkeypatch.setattr(torch, "allclose", lambda *args, **kwargs: False)
    for one, both in zip(found, gradients(), strict=True):
        torch.testing.assert_close(one, both, rtol=1e-4, atol=1e-7)
        assert both.abs().max() > 1e-4
