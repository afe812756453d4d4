"""Sparse training: the budget of features, which entries are kept, and bad values."""

import pytest
import torch
from cached import MANY
from peft import get_peft_model
from tiny import D_SAE, make_model, make_sae, random_code, trained_codes

from yapo_peft import ConfigError, YaPOConfig, YaPOTrainingConfig
from yapo_peft.trainer.sparsity import feature_budget
from yapo_peft.tuner.adapters import steered_layers


def nonzero(trainer):
    return [int(entry["code/nonzero"]) for entry in trainer.state.log_history if "code/nonzero" in entry]


def test_budget_decreases_by_the_same_factor_in_each_step(tmp_path):
    args = YaPOTrainingConfig(
        output_dir=str(tmp_path), max_features=10, sparsify_start=0.2, sparsify_end=0.6, use_cpu=True
    )
    assert [feature_budget(args, progress, 1000) for progress in (0.0, 0.19)] == [None, None]
    assert [feature_budget(args, progress, 1000) for progress in (0.2, 0.4, 0.6, 1.0)] == [1000, 100, 10, 10]
    assert feature_budget(args, 1.0, 6) == 6


@pytest.mark.feature("Training", "`max_features`: a budget of features that is reached during training; `l1`")
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("layers", [2, [1, 3]])
def test_codes_end_within_their_budget(train, layers, cached):
    saes = [make_sae(seed=seed) for seed in range(len(layers) if isinstance(layers, list) else 1)]
    options = {"adapter": {"layers": layers, "sae": saes}, "max_steps": 10, "max_features": 7}
    trainer = train(cached, **options)
    counts = nonzero(trainer)
    assert max(counts) > 3 * 7
    assert counts[-1] == 7
    assert int(trained_codes(trainer).count_nonzero()) == 7


def test_entries_with_the_largest_effect_are_kept(build):
    sae = make_sae()
    sae.W_dec.data[:5] *= 100
    code = torch.full((D_SAE,), 1.0)
    trainer = build(adapter={"sae": sae}, code=code, max_steps=1, max_features=5, sparsify_start=0.0, sparsify_end=0.5)
    trainer.train()
    assert trained_codes(trainer)[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 4]


def test_l1_shrinks_entries(build):
    code = random_code(1.0)
    plain = build(code=code, max_steps=1, lr_scheduler_type="constant")
    shrunk = build(code=code, max_steps=1, lr_scheduler_type="constant", l1=2.0)
    plain.train()
    shrunk.train()
    expected = trained_codes(plain)[0]
    expected = expected.sign() * (expected.abs() - 0.1 * 2.0).clamp(min=0)
    torch.testing.assert_close(trained_codes(shrunk)[0], expected)
    assert 0 < int((trained_codes(shrunk) == 0).sum()) < D_SAE


def test_resumed_sparse_training_is_bit_identical(build, tmp_path):
    options = {"train_dataset": MANY, "max_steps": 8, "save_steps": 4, "max_features": 6, "l1": 0.01}
    whole = build(**options)
    whole.train()
    resumed = build(out="resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert torch.equal(trained_codes(resumed), trained_codes(whole))


def test_frozen_adapters_keep_their_codes(build):
    model = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae()))
    model.add_adapter("frozen", YaPOConfig(layers=2, sae=make_sae()))
    steered_layers(model)[0].yapo_code["frozen"].data.copy_(random_code())
    trainer = build(model=model, max_steps=2, max_features=3)
    trainer.train()
    assert int(trained_codes(trainer)[0].count_nonzero()) == 3
    assert torch.equal(steered_layers(model)[0].yapo_code["frozen"].data, random_code())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_features": 0}, "max_features=0: must be a whole number, at least 1"),
        ({"sparsify_start": 0.8, "sparsify_end": 0.5}, r"sparsify_start=0\.8, sparsify_end=0\.5: must be fractions"),
        ({"sparsify_end": 1.5}, r"sparsify_end=1\.5"),
        ({"l1": -1.0}, r"l1=-1\.0: must be a finite number, at least 0"),
        ({"adapter": {"space": "dense", "sae": None}, "l1": 0.1}, "adapter 'default' has space='dense'"),
    ],
)
def test_bad_values_are_rejected(build, options, message):
    with pytest.raises(ConfigError, match=message):
        build(**options)
