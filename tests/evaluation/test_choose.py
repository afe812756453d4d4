"""Choosing among layers, SAEs and numbers of features."""

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from tiny import make_model, make_sae, random_ids

from yapo_peft import ConfigError, DatasetError, YaPOConfig, YaPOTrainer, YaPOTrainingConfig, calibrate, sweep
from yapo_peft.evaluation import Candidate, choose
from yapo_peft.tuner.adapters import steered_layers

pytestmark = pytest.mark.usefixtures("few_neutral_rows")
OPTIONS = {"bf16": False, "use_cpu": True, "logging_strategy": "no", "seed": 3}


@pytest.fixture
def data(pairs):
    return pairs.select(range(len(pairs) - 3)), pairs.select(range(len(pairs) - 3, len(pairs)))


def dense(*layers):
    return [Candidate(YaPOConfig(layers=layer, space="dense")) for layer in layers]


@pytest.mark.feature("Evaluation", "`choose`: layer, SAE and number of features, by short trainings at equal damage")
def test_the_best_half_is_trained_again_and_measured_at_equal_damage(tmp_path, tokenizer, data, monkeypatch):
    model, trained = make_model(), []
    logits = model(random_ids()).logits
    run = YaPOTrainer.train
    monkeypatch.setattr(YaPOTrainer, "train", lambda self: trained.append(self.args.max_steps) or run(self))
    found = choose(model, tokenizer, dense(0, 1, 2), *data, tmp_path / "out", steps=8, max_kl=1e-3, **OPTIONS)
    assert trained == [2, 2, 2, 4, 4]
    assert torch.equal(model(random_ids()).logits, logits)
    assert not steered_layers(model)
    table = found.table
    assert table["steps"].tolist() == [4, 4, 2]
    assert table["candidate"][0] == found.best.name
    assert sorted(table["candidate"]) == ["layer 0, dense", "layer 1, dense", "layer 2, dense"]
    assert table["gain"][0] >= table["gain"][1]
    assert found.lead[0] == pytest.approx(table["gain"][0] - table["gain"][1])
    assert found.lead[1] <= found.lead[0] <= found.lead[2]
    assert not (tmp_path / "out" / "activations").exists()

    # The best is what its own training gives, once calibrated.
    own = get_peft_model(model, YaPOConfig(layers=found.best.config.layers, space="dense"))
    args = YaPOTrainingConfig(
        output_dir=str(tmp_path / "x"), max_steps=4, max_kl=1e-3, save_strategy="no", report_to="none",
        cache_activations=True, activation_cache_dir=str(tmp_path / "cache"), **OPTIONS,
    )  # fmt: skip
    run(YaPOTrainer(own, args, train_dataset=data[0], processing_class=tokenizer))
    damage = calibrate(own, tokenizer, 1e-3)
    margins = sweep(own, data[1], tokenizer, (-1.0, 0.0, 1.0)).summary()["margin"]
    assert table["up"][0] == pytest.approx(margins[2] - margins[1], rel=1e-3)
    assert table["down"][0] == pytest.approx(margins[0] - margins[1], rel=1e-3)
    assert table["kl_plus"][0] == pytest.approx(damage["plus"], rel=1e-3)


def test_an_interrupted_choice_goes_on_and_other_arguments_are_refused(tmp_path, tokenizer, data, monkeypatch):
    candidates = [Candidate(YaPOConfig(layers=2, sae=make_sae()), features) for features in (4, None)]
    run, calls = YaPOTrainer.train, []

    def interrupted(self):
        calls.append(self.args.max_features)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(self)

    monkeypatch.setattr(YaPOTrainer, "train", interrupted)
    model, arguments = make_model(), (tokenizer, candidates, *data, tmp_path)
    options = {"steps": 8, "max_kl": 1e-3, **OPTIONS}
    with pytest.raises(KeyboardInterrupt):
        choose(model, *arguments, **options)
    assert not steered_layers(model)
    found = choose(model, *arguments, **options)
    assert calls == [4, None, None, *[candidates[int(found.table["features"][0] > 4)].max_features], calls[-1]]
    assert set(found.table["candidate"]) == {"layer 2, sae, 4 features", "layer 2, sae"}
    again = choose(model, *arguments, **options)
    assert len(calls) == 5
    assert again.table.equals(found.table)
    elsewhere = [Candidate(YaPOConfig(layers=2, sae=make_sae(seed=5)), features) for features in (4, None)]
    with pytest.raises(ConfigError, match=r"has results of another run .*candidate 1"):
        choose(model, tokenizer, elsewhere, *data, tmp_path, **options)
    with pytest.raises(ConfigError, match=r"has results of another run \(max_kl: 0\.001 before, 0\.002 now\)"):
        choose(model, *arguments, **(options | {"max_kl": 2e-3}))


def test_bad_arguments_are_named_before_any_training(tmp_path, tokenizer, data):
    model = make_model()
    for candidates, pairs, error, message in (
        (
            [*dense(1), Candidate(dense(2)[0].config, 4)],
            data[0],
            ConfigError,
            "layer 2, dense, 4 features: max_features=",
        ),
        (dense(1), data[0], ConfigError, "at least two are needed"),
        (dense(1, 1), data[0], ConfigError, "whose names differ"),
        (dense(1, 2), Dataset.from_list([]), DatasetError, "0 pairs to train on and 3 held out"),
    ):
        with pytest.raises(error, match=message):
            choose(model, tokenizer, candidates, pairs, data[1], tmp_path)
    with pytest.raises(ConfigError, match="max_steps=3: choose sets it"):
        choose(model, tokenizer, dense(1, 2), *data, tmp_path, max_steps=3)
    with pytest.raises(ConfigError, match="The model has adapters"):
        choose(get_peft_model(model, dense(1)[0].config), tokenizer, dense(1, 2), *data, tmp_path)
    assert not list(tmp_path.iterdir())
