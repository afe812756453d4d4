"""Training on cached activations: as without."""

import pytest
import torch
from cached import HELD_OUT, MANY
from datasets import Dataset
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from tiny import (
    ARCHITECTURES,
    SAE_KINDS,
    VOCABULARY,
    make_model,
    make_sae,
    preference_rows,
    random_code,
    random_ids,
    set_code,
    trained_codes,
)
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, BloomConfig

from yapo_peft import YaPOConfig
from yapo_peft.scoring import cache
from yapo_peft.tuner.adapters import steered_layers
from yapo_peft.tuner.hooks import REPEATS_HOOKS


def metrics_of(trainer):
    """What was logged and evaluated, without times."""
    found = [*trainer.state.log_history, trainer.evaluate()]
    rates = ("runtime", "per_second", "flos")
    return [
        {name: value for name, value in entry.items() if not any(rate in name for rate in rates)} for entry in found
    ]


def assert_trained_alike(cached, plain, rtol=1e-5):
    codes, expected = trained_codes(cached), trained_codes(plain)
    assert float((codes - expected).norm() / expected.norm()) < rtol
    assert torch.equal(codes != 0, expected != 0)
    for ours, theirs in zip(metrics_of(cached), metrics_of(plain), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


OPTIONS = {
    "batch": {},
    "example": {"direction": "example"},
    "both": {"direction": "both"},
    "no reference": {"reference": "none"},
    "layers": {"adapter": {"layers": [1, 2], "sae": [make_sae(seed=1), make_sae(seed=2)]}},
    "last layer": {"adapter": {"layers": -1}},
    "dense": {"adapter": {"space": "dense", "sae": None}},
    "answers only": {"adapter": {"positions": "completion"}},
    "start of answers": {"adapter": {"positions": "completion[:2]"}},
    "end of prompts": {"adapter": {"positions": "prompt[-2:]"}, "direction": "both"},
    "last tokens": {"adapter": {"positions": "last"}, "direction": "example"},
    "ld_alpha": {"ld_alpha": 0.3},
    "weighting": {"use_weighting": True},
    "several losses": {"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0, 0.5]},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "cut": {"max_length": 13},
    "normalised": {"adapter": {"sae": make_sae(normalize_activations="layer_norm")}},
    "lengths": {"train_sampling_strategy": "group_by_length"},
}


@pytest.mark.feature(
    "Speed", "`cache_activations=True`: the same codes and metrics from the layers above, for each option"
)
@pytest.mark.filterwarnings("ignore:.*are cut to max_length=13")
@pytest.mark.parametrize("name", OPTIONS)
def test_cached_activations_train_as_the_whole_model(train, name):
    if name == "checkpointing" and REPEATS_HOOKS:
        pytest.skip("this version of transformers repeats hooks, which is refused")
    options = {"code": random_code(0.3, scale=0.5), "max_steps": 6} | OPTIONS[name]
    assert_trained_alike(train(True, **options), train(False, **options))


def test_a_dense_adapter_beside_a_sparse_one_trains_alike(train):
    models = []
    for _ in range(2):
        model = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae()))
        model.add_adapter("dense", YaPOConfig(layers=2, space="dense"))
        set_code(model, random_code(0.3, scale=0.5))
        model.base_model.set_adapter(["default", "dense"])
        models.append(model)
    assert_trained_alike(train(True, model=models[0]), train(False, model=models[1]))
    dense = [steered_layers(model)[0].yapo_code["dense"].detach() for model in models]
    assert dense[0].any()
    assert_close(dense[0], dense[1], rtol=1e-4, atol=1e-6)


def test_eager_attention_trains_alike(train, capsys):
    models = [get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae())) for _ in range(2)]
    for model in models:
        model.get_base_model().set_attn_implementation("eager")
    assert_trained_alike(train(True, model=models[0]), train(False, model=models[1]))
    assert "each prompt once" in capsys.readouterr().out


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shared", [True, False])
def test_every_architecture_trains_alike(train, architecture, shared, monkeypatch, capsys):
    if not shared:
        monkeypatch.setattr(cache, "why_not_shared", lambda *args: "of this test")
    options = {"model": architecture, "code": random_code(0.3, scale=0.5), "direction": "both"}
    assert_trained_alike(train(True, **options), train(False, **options))
    assert ("each prompt once" if shared else "rows as they are: of this test") in capsys.readouterr().out


@pytest.mark.parametrize("kind", SAE_KINDS)
def test_every_kind_of_sae_trains_alike(train, kind):
    options = {"adapter": {"sae": make_sae(kind)}, "max_steps": 6}
    assert_trained_alike(train(True, **options), train(False, **options))


@pytest.mark.slow
def test_codes_agree_after_a_hundred_steps(train):
    cached, plain = (trained_codes(train(flag, max_steps=100, learning_rate=0.02)) for flag in (True, False))
    assert float((cached - plain).norm() / plain.norm()) < 1e-5


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_prompts_are_not_shared_beyond_the_attention_window(train, architecture, capsys):
    rows = preference_rows(8, conversational=False)
    long = Dataset.from_list([{name: " ".join([text] * 4) for name, text in row.items()} for row in rows])
    options = {"model": architecture, "train_dataset": long}
    cached = train(True, **options)
    assert "rows as they are: sequences are longer than the attention's window" in capsys.readouterr().out
    assert_trained_alike(cached, train(False, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_16_bits_train_close_to_the_whole_model(train, dtype):
    codes = []
    for flag in (True, False):
        model = get_peft_model(make_model(dtype=dtype), YaPOConfig(layers=2, sae=make_sae()))
        codes.append(trained_codes(train(flag, model=model, code=random_code(0.3, scale=0.5))))
    assert float((codes[0] - codes[1]).norm() / codes[1].norm()) < 0.05


def test_model_is_restored_after_training(train):
    trainer = train(True)
    whole = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae())).eval()
    steered_layers(whole)[0].yapo_code["default"].data.copy_(trained_codes(trainer)[0])
    with torch.no_grad():
        assert torch.equal(trainer.model.eval()(random_ids()).logits, whole(random_ids()).logits)
    assert not any("forward" in block.__dict__ for block in trainer.model.get_base_model().model.layers)


def test_lower_layers_do_not_run(train, monkeypatch):
    trainer = train(True)
    ran = []
    for index, block in enumerate(trainer.model.get_base_model().model.layers):
        block.self_attn.register_forward_hook(lambda *args, index=index: ran.append(index))
    trainer.evaluate()
    assert set(ran) == {3}
    trainer.evaluate(Dataset.from_list(preference_rows(3, seed=9)))
    assert set(ran) == {0, 1, 2, 3}


def test_dataset_of_another_trainer_is_cached_again(train, build):
    first = train(True)
    again = train(True, train_dataset=first.train_dataset)
    assert_close(trained_codes(again), trained_codes(first))
    plain = build(train_dataset=first.train_dataset)
    plain.train()
    assert_close(trained_codes(plain), trained_codes(first), rtol=1e-4, atol=1e-6)


def test_workers_can_collate(train):
    assert_trained_alike(train(True, dataloader_num_workers=1), train(False))


def test_autocast_trains_close_to_the_whole_model(train):
    cached, plain = (trained_codes(train(flag, bf16=True)) for flag in (True, False))
    assert float((cached - plain).norm() / plain.norm()) < 0.05


def test_another_dataset_to_evaluate_on_runs_through_the_whole_model(train):
    other = Dataset.from_list(preference_rows(5, seed=9))
    found = [train(flag).evaluate(other) for flag in (True, False)]
    assert found[0]["eval_loss"] == pytest.approx(found[1]["eval_loss"], rel=1e-5)
    named = {"first": HELD_OUT, "second": other}
    found = [train(flag, init={"eval_dataset": named}).evaluate() for flag in (True, False)]
    for name in named:
        assert found[0][f"eval_{name}_loss"] == pytest.approx(found[1][f"eval_{name}_loss"], rel=1e-5)


def test_resuming_with_the_cache_is_bit_identical(train, build, tmp_path):
    whole = train(True, max_steps=6, save_steps=3)
    folder = {"cache_activations": True, "activation_cache_dir": str(tmp_path / "activations")}
    resumed = build(train_dataset=MANY, max_steps=6, out="resumed", **folder)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert torch.equal(trained_codes(resumed), trained_codes(whole))


@pytest.mark.filterwarnings("ignore:.*modify a model with PEFT", "ignore:Already found")
def test_a_frozen_lora_beside_the_code_is_part_of_the_model(train, tmp_path):
    codes = []
    for flag in (True, False, True):
        base = make_model()
        torch.manual_seed(len(codes) // 2)
        inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), base, "default")
        base.requires_grad_(False)
        model = get_peft_model(base, YaPOConfig(layers=2, sae=make_sae()))
        codes.append(trained_codes(train(flag, model=model, init={})))
    assert float((codes[0] - codes[1]).norm() / codes[1].norm()) < 1e-5
    assert len(list((tmp_path / "activations").iterdir())) == 2


def test_answers_that_would_attend_to_each_other_keep_their_rows(train, capsys):
    models = []
    for _ in range(2):
        base = make_model()
        forward = base.model.layers[3].forward
        # As a short convolution over the tokens does, which no mask reaches.
        base.model.layers[3].forward = lambda h, *args, forward=forward, **kwargs: (
            forward(h, *args, **kwargs) + 1e-3 * nn.functional.pad(h, (0, 0, 1, 0))[:, :-1]
        )
        models.append(get_peft_model(base, YaPOConfig(layers=2, sae=make_sae())))
    cached = train(True, model=models[0])
    assert "rows as they are: answers would attend to each other" in capsys.readouterr().out
    assert_trained_alike(cached, train(False, model=models[1]))


def test_layers_that_return_tuples_train_alike(train):
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=4, n_head=4)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(config).eval()
        models.append(get_peft_model(base, YaPOConfig(layers=2, sae=make_sae())))
    assert_trained_alike(train(True, model=models[0]), train(False, model=models[1]))


def test_rows_of_another_cache_are_ignored(train, build):
    first = train(True, init={}, max_steps=1)
    cached = train(True, train_dataset=HELD_OUT, max_steps=1)
    plain = train(False, train_dataset=HELD_OUT, max_steps=1)
    expected = plain.evaluate(first.train_dataset)
    found = cached.evaluate(first.train_dataset)
    assert found["eval_margin/plus"] == pytest.approx(expected["eval_margin/plus"], rel=1e-4, abs=1e-5)


def test_run_without_the_cache_prints_what_it_recomputes(train, capsys):
    train(False)
    assert "runs all 4 layers" in capsys.readouterr().out
