"""Training on cached activations: as without, from what is on disk, and refused where that cannot be."""

import json
import shutil
from pathlib import Path

import pytest
import torch
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
    trained_codes,
)
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, BloomConfig

from yapo_peft import (
    ActivationCacheError,
    ConfigError,
    UnsupportedOperationError,
    YaPOConfig,
    delete_activation_cache,
)
from yapo_peft.trainer import activations, cache
from yapo_peft.tuner.strength import steered_layers

MANY = Dataset.from_list(preference_rows(16))
HELD_OUT = Dataset.from_list(preference_rows(5, seed=5))


@pytest.fixture
def train(build, tmp_path):
    """Trains, with cached activations or without, and returns the trainer."""

    def run(cached, **options):
        folder = {"cache_activations": True, "activation_cache_dir": str(tmp_path / "activations")} if cached else {}
        options = {"train_dataset": MANY, "init": {"eval_dataset": HELD_OUT}} | options
        trainer = build(**folder, **options)
        trainer.train()
        return trainer

    return run


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
    "answers only": {"adapter": {"positions": "completion"}},
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
    "Speed", "`cache_activations=True`: the same codes and metrics from the blocks above, for each option"
)
@pytest.mark.parametrize("name", OPTIONS)
def test_cached_activations_train_as_the_whole_model(train, name):
    options = {"code": random_code(0.3, scale=0.5), "max_steps": 6} | OPTIONS[name]
    assert_trained_alike(train(True, **options), train(False, **options))


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
        monkeypatch.setattr(cache.ActivationCache, "_why_not_shared", lambda *args: "of this test")
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
def test_prompts_are_not_shared_where_a_window_of_attention_would_move(train, architecture, capsys):
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


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_activations_stored_in_16_bits_take_half_the_space_and_train_close(train, stored, tmp_path):
    exact = trained_codes(train(True))
    whole = sum(file.stat().st_size for file in (tmp_path / "activations").glob("*/*"))
    shutil.rmtree(tmp_path / "activations")
    rounded = trained_codes(train(True, activation_cache_dtype=stored))
    half = sum(file.stat().st_size for file in (tmp_path / "activations").glob("*/*"))
    assert half < 0.75 * whole
    assert 0 < float((rounded - exact).norm() / exact.norm()) < 0.2


def parts_of(folder):
    return sorted(Path(folder).glob("activations/*/part-*.safetensors"))


@pytest.mark.feature("Speed", "A killed run's cache is completed, and later runs and seeds use it")
def test_what_is_on_disk_is_not_computed_again(train, tmp_path, monkeypatch):
    monkeypatch.setattr(activations, "_TOKENS", 60)
    first = train(True)
    parts = parts_of(tmp_path)
    assert len(parts) > 4
    written = {part: part.stat().st_mtime_ns for part in parts}
    parts[1].unlink()
    computed = []
    compute = cache.ActivationCache._compute
    counting = lambda self, examples, *args: computed.extend(examples) or compute(self, examples, *args)  # noqa: E731
    monkeypatch.setattr(cache.ActivationCache, "_compute", counting)
    again = train(True)
    assert 0 < len(computed) < len(MANY) / 2
    assert parts_of(tmp_path) == parts
    assert all(part.stat().st_mtime_ns == written[part] for part in parts if part != parts[1])
    assert_close(trained_codes(again), trained_codes(first), rtol=1e-6, atol=1e-7)
    computed.clear()
    train(True, seed=7, direction="both", learning_rate=0.01)
    assert not computed


def test_a_failure_leaves_no_file_behind(train, tmp_path, monkeypatch):
    def fail(tensors, file):
        Path(file).write_bytes(b"half of it")
        raise OSError("the disk is gone")

    monkeypatch.setattr(activations, "save_file", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        train(True)
    assert [file.name for file in tmp_path.glob("activations/*/*")] == ["activations.json"]


CHANGES = {
    "model": {"model": "gpt2"},
    "layer": {"adapter": {"layers": 1}},
    "sae": {"adapter": {"sae": make_sae(seed=3)}},
    "data": {"train_dataset": Dataset.from_list(preference_rows(16, seed=8))},
    "max_length": {"max_length": 13},
    "dtype": {"activation_cache_dtype": "bfloat16"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_model_sae_dataset_or_dtype_has_a_cache_of_its_own(train, change, tmp_path):
    train(True, init={})
    train(True, init={}, **CHANGES[change])
    assert len(list((tmp_path / "activations").iterdir())) == 2
    records = [json.loads(file.read_text()) for file in tmp_path.glob("activations/*/activations.json")]
    assert records[0] != records[1]


def test_weights_that_changed_have_a_cache_of_their_own(train, tmp_path):
    for scale in (1.0, 1.01):
        model = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae()))
        model.get_base_model().lm_head.weight.data.mul_(scale)
        train(True, model=model, init={})
    assert len(list((tmp_path / "activations").iterdir())) == 2


def test_activations_that_do_not_fit_the_model_are_found_out(train, tmp_path):
    from safetensors.torch import load_file, save_file

    train(True, init={})
    (part,) = parts_of(tmp_path)
    tensors = load_file(part)
    save_file(tensors | {"hidden": tensors["hidden"].flip(0).contiguous()}, part)
    with pytest.raises(ActivationCacheError, match="Delete that folder"):
        train(True, init={})
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(ActivationCacheError, match="cannot be read"):
        train(True, init={})


@pytest.mark.feature("Speed", "Space is estimated beforehand; too little of it is an error before the work")
def test_too_little_space_is_an_error_before_the_work(train, tmp_path, monkeypatch, capsys):
    train(True, init={})
    said = capsys.readouterr().out
    (part,) = parts_of(tmp_path)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    train(True, init={})
    with pytest.raises(ActivationCacheError, match="has 0 MB left"):
        train(True, init={}, max_length=13)
    assert parts_of(tmp_path) == [part]
    assert "Caching the activations of" in said


def test_the_estimate_is_close(train, tmp_path, monkeypatch):
    seen = []
    announce = cache.ActivationCache._announce

    def listen(self, store, name, sizes, width, why):
        seen.append(sum(sizes) * width)
        announce(self, store, name, sizes, width, why)

    monkeypatch.setattr(cache.ActivationCache, "_announce", listen)
    train(True, init={})
    (part,) = parts_of(tmp_path)
    assert seen[0] == pytest.approx(part.stat().st_size, rel=0.2)


@pytest.mark.feature("Speed", "`delete_activation_cache()` deletes it all")
def test_one_call_deletes_the_cache(train, build, tmp_path, monkeypatch):
    train(True)
    folder = tmp_path / "activations"
    (folder / "not ours").mkdir()
    size = sum(file.stat().st_size for file in folder.glob("*/*"))
    assert delete_activation_cache(folder) == size
    assert [place.name for place in folder.iterdir()] == ["not ours"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    build(cache_activations=True, train_dataset=MANY, init={"eval_dataset": HELD_OUT})
    assert delete_activation_cache() == size
    assert delete_activation_cache() == 0


def test_the_model_is_whole_again_after_training(train):
    trainer = train(True)
    whole = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae())).eval()
    steered_layers(whole)[0].yapo_code["default"].data.copy_(trained_codes(trainer)[0])
    with torch.no_grad():
        assert torch.equal(trainer.model.eval()(random_ids()).logits, whole(random_ids()).logits)
    assert not any("forward" in block.__dict__ for block in trainer.model.get_base_model().model.layers)


def test_lower_blocks_do_not_run(train, monkeypatch):
    trainer = train(True)
    ran = []
    for index, block in enumerate(trainer.model.get_base_model().model.layers):
        block.self_attn.register_forward_hook(lambda *args, index=index: ran.append(index))
    trainer.evaluate()
    assert set(ran) == {3}
    trainer.evaluate(Dataset.from_list(preference_rows(3, seed=9)))
    assert set(ran) == {0, 1, 2, 3}


def test_a_dataset_of_another_trainer_is_cached_anew(train, build):
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


def test_a_run_goes_on_from_a_checkpoint(train, build, tmp_path):
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


@pytest.mark.filterwarnings("ignore:.*modify a model with PEFT", "ignore:Already found")
def test_another_scaling_of_a_lora_has_a_cache_of_its_own(train, tmp_path):
    for alpha in (8, 32):
        base = make_model()
        torch.manual_seed(0)
        inject_adapter_in_model(
            LoraConfig(target_modules=["q_proj"], init_lora_weights=False, lora_alpha=alpha), base, "default"
        )
        base.requires_grad_(False)
        train(True, model=get_peft_model(base, YaPOConfig(layers=2, sae=make_sae())), init={})
    assert len(list((tmp_path / "activations").iterdir())) == 2


def test_answers_that_would_see_each_other_keep_their_rows(train, capsys):
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
    assert "rows as they are: answers would see each other" in capsys.readouterr().out
    assert_trained_alike(cached, train(False, model=models[1]))


def test_noise_that_is_no_module_is_refused(train):
    base = make_model()
    for block in base.model.layers:
        block.self_attn.attention_dropout = 0.3
    with pytest.raises(UnsupportedOperationError, match="adds noise in training mode"):
        train(True, model=get_peft_model(base, YaPOConfig(layers=2, sae=make_sae())))


def test_blocks_that_put_out_tuples_train_alike(train):
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=4, n_head=4)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(config).eval()
        models.append(get_peft_model(base, YaPOConfig(layers=2, sae=make_sae())))
    assert_trained_alike(train(True, model=models[0]), train(False, model=models[1]))


def test_rows_of_another_cache_are_not_taken_for_these(train, build):
    first = train(True, init={}, max_steps=1)
    cached = train(True, train_dataset=HELD_OUT, max_steps=1)
    plain = train(False, train_dataset=HELD_OUT, max_steps=1)
    expected = plain.evaluate(first.train_dataset)
    found = cached.evaluate(first.train_dataset)
    assert found["eval_margin/plus"] == pytest.approx(expected["eval_margin/plus"], rel=1e-4, abs=1e-5)


def test_another_active_adapter_needs_another_trainer(build, tmp_path):
    model = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae()), adapter_name="first")
    for name, layer in (("same layer", 2), ("above", 3), ("below", 1)):
        model.add_adapter(name, YaPOConfig(layers=layer, sae=make_sae(seed=5)))
    folder = {"cache_activations": True, "activation_cache_dir": str(tmp_path / "activations")}
    trainer = build(model=model, **folder)
    for name in ("same layer", "above", "below"):
        model.set_adapter(name)
        with pytest.raises(ConfigError, match="Make a new trainer"):
            trainer.train()


def test_a_folder_that_cannot_be_written_to_is_an_error_before_the_work(train, build, tmp_path, monkeypatch):
    (tmp_path / "activations").write_text("a file")
    with pytest.raises(ActivationCacheError, match="give another activation_cache_dir"):
        train(True)
    monkeypatch.setenv("HOME", str(tmp_path))
    build(train_dataset=MANY, cache_activations=True, activation_cache_dir="~/cache")
    assert delete_activation_cache(tmp_path / "cache") > 0


class Skipping(nn.Module):
    """A block that hands something of its own upwards."""

    def __init__(self, block):
        super().__init__()
        self.block = block
        self.attention_type = getattr(block, "attention_type", None)

    def forward(self, hidden_states, *args, **kwargs):
        Skipping.seen = hidden_states.sum(dim=(0, 1))
        return self.block(hidden_states, *args, **kwargs)


def test_models_whose_blocks_cannot_be_skipped_are_found_out(train):
    model = make_model()
    upper = model.model.layers[3]
    model.model.layers[1] = Skipping(model.model.layers[1])
    forward = upper.forward
    upper.forward = lambda hidden_states, *args, **kwargs: forward(hidden_states, *args, **kwargs) + Skipping.seen
    model = get_peft_model(model, YaPOConfig(layers=2, sae=make_sae()))
    with pytest.raises(ActivationCacheError, match="depends on more than the output of the one below"):
        train(True, model=model)


REFUSED = {
    "a stream": ({"train_dataset": MANY.to_iterable_dataset()}, UnsupportedOperationError, "without streaming"),
    "keep_end": ({"max_length": 13, "truncation_mode": "keep_end"}, UnsupportedOperationError, "keep_start"),
    "torch_compile": ({"torch_compile": True}, UnsupportedOperationError, "torch_compile"),
    "reference twice": ({"precompute_ref_log_probs": True}, ConfigError, "part of cache_activations"),
    "dtype": ({"activation_cache_dtype": "int8"}, ConfigError, "float32, bfloat16, float16"),
    "collator": ({"init": {"data_collator": lambda rows: {}}}, UnsupportedOperationError, "data_collator"),
}


@pytest.mark.filterwarnings("ignore:.*keep_end")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_cached_is_refused_before_the_work(train, name, tmp_path):
    options, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        train(True, **options)
    assert not (tmp_path / "activations").exists()


def test_dropout_and_other_trainable_parameters_are_refused(train):
    model = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae()))
    model.get_base_model().model.layers[0].mlp.drop = nn.Dropout(0.1)
    with pytest.raises(UnsupportedOperationError, match="drops some at random"):
        train(True, model=model, disable_dropout=False)
    model = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae(), modules_to_save=["lm_head"]))
    with pytest.raises(UnsupportedOperationError, match="trained as well"):
        train(True, model=model)


@pytest.mark.parametrize("option", ["activation_cache_dir", "activation_cache_dtype"])
def test_options_of_the_cache_need_it(train, option):
    with pytest.raises(ConfigError, match="needs cache_activations=True"):
        train(False, **{option: "float16"})


def test_a_run_without_the_cache_says_what_it_repeats(train, capsys):
    train(False)
    assert "runs through all 4 blocks" in capsys.readouterr().out
