import copy
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from tiny import CHECKPOINTING, make_model, make_sae, preference_rows, trained_codes
from trl import DPOConfig

from yapo_peft import (
    AdapterFileError,
    ConfigError,
    DatasetError,
    NonFiniteLossError,
    SAEMismatchError,
    UnsupportedOperationError,
    YaPOConfig,
    YaPOTrainer,
    YaPOTrainingConfig,
    sweep,
)
from yapo_peft.evaluation import Repetition
from yapo_peft.methods import measure_contrast
from yapo_peft.tuner.adapters import steered_layers


@pytest.mark.feature(
    "Training",
    '`apo_down`; `aot` with `direction="example"`; ratio losses with `reference="none"`; `sync_ref_model`',
    refused="they contradict the objective",
)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"direction": "up"}, ConfigError, "direction='up': must be one of"),
        ({"reference": "model"}, ConfigError, "reference='model': must be one of"),
        ({"loss_type": "apo_down"}, UnsupportedOperationError, "'apo_down' cannot train a steering code: it lowers"),
        ({"loss_type": "aot", "direction": "example"}, UnsupportedOperationError, "it sorts a batch"),
        ({"loss_type": "bco_pair", "reference": "none"}, UnsupportedOperationError, "reference='none' has none"),
        ({"beta": 0.0}, ConfigError, "beta=0.0: must be positive"),
        ({"reference": "none", "precompute_ref_log_probs": True}, ConfigError, "nothing to compute"),
        ({"reference": "none", "f_divergence_type": "forward_kl"}, ConfigError, "f_divergence_type='forward_kl'"),
    ],
)
def test_invalid_options_are_rejected(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        YaPOTrainingConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, **options)


def test_moving_references_are_not_supported(build):
    with pytest.raises(NotImplementedError, match="sync_ref_model=True"):
        build(sync_ref_model=True)


def test_unknown_option_is_rejected(tmp_path):
    with pytest.raises(TypeError, match="unexpected keyword argument 'directions'"):
        YaPOTrainingConfig(output_dir=str(tmp_path), directions="both")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "train_dataset is empty"),
        (
            [{"prompt": "w1", "answer": "w2"}],
            r"has the columns \['answer', 'prompt'\], but lacks \['chosen', 'rejected'\]",
        ),
        ([{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}], r"but lacks \['chosen', 'rejected'\]"),
        ([{"text": "w1"}], r"lacks \['chosen', 'rejected'\]"),
    ],
)
@pytest.mark.parametrize("streaming", [True, False])
def test_datasets_without_pairs_are_rejected(build, rows, message, streaming):
    dataset = IterableDataset.from_generator(lambda: iter(rows)) if streaming else Dataset.from_list(rows)
    with pytest.raises(DatasetError, match=message):
        build(train_dataset=dataset)


PLAIN, CHAT = preference_rows(2, conversational=False), preference_rows(2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (PLAIN[1] | {"rejected": None}, "Row 1 of train_dataset has rejected=None"),
        (CHAT[1] | {"rejected": []}, r"Row 1 of train_dataset has rejected=\[\]"),
        (PLAIN[1] | {"prompt": CHAT[1]["prompt"]}, "Row 1 of train_dataset has prompt as messages, chosen as a text"),
    ],
)
def test_rows_without_answers_are_rejected(build, row, message):
    good = CHAT[0] if isinstance(row["chosen"], list) else PLAIN[0]
    if isinstance(row["prompt"], list) and isinstance(row["chosen"], str):
        good = row
    with pytest.raises(DatasetError, match=message.replace("Row 1", "Row 0") if good is row else message):
        build(train_dataset=Dataset.from_list([good, row]))


def test_datasets_are_checked_before_a_model_is_loaded():
    config = YaPOConfig(layers=0, sae_path="nowhere")
    with pytest.raises(DatasetError, match="train_dataset is empty"):
        YaPOTrainer("no/such/model", train_dataset=Dataset.from_list([]), peft_config=config)


def test_an_eval_dataset_is_checked_by_its_name(build, pairs):
    with pytest.raises(DatasetError, match=r"eval_dataset\['held_out'\] is empty"):
        build(init={"eval_dataset": {"held_out": Dataset.from_list([])}})


@pytest.mark.parametrize("streaming", [True, False])
def test_prompts_that_fill_max_length_are_rejected(build, pairs, streaming):
    dataset = pairs.to_iterable_dataset() if streaming else pairs
    with pytest.raises(
        DatasetError, match="No pair of the train dataset is left: every prompt alone fills max_length=3"
    ):
        build(train_dataset=dataset, max_length=3)


def test_dropped_pairs_are_counted_in_a_warning(build):
    rows = preference_rows(8)
    rows[2]["prompt"][0]["content"] = " ".join(["w1"] * 40)
    with pytest.warns(UserWarning, match="1 of 8 pairs of the train dataset are left out: .* max_length=30"):
        trainer = build(train_dataset=Dataset.from_list(rows), max_length=30)
    assert len(trainer.train_dataset) == 7


def test_pairs_that_are_cut_are_counted_in_a_warning(build):
    rows = preference_rows(8)
    rows[5]["chosen"][0]["content"] = " ".join(["w1"] * 40)
    with pytest.warns(UserWarning, match="1 of 8 pairs of the train dataset are cut to max_length=30, so that parts"):
        build(train_dataset=Dataset.from_list(rows), max_length=30)


@pytest.mark.feature("Training", "A loss that is not finite stops training before it spoils the codes")
def test_nan_loss_stops_training_and_saves_the_codes(build):
    trainer = build(max_steps=6, save_strategy="no", direction="both")
    directed, seen = trainer._directed_loss, []

    def breaks_in_the_third_step(*args, **kwargs):
        loss, logps = directed(*args, **kwargs)
        if trainer.state.global_step == 2:
            seen.append(trained_codes(trainer).clone())
            loss = loss * float("nan")
        return loss, logps

    trainer._directed_loss = breaks_in_the_third_step
    with pytest.raises(
        NonFiniteLossError, match=r"The loss is nan in step 3. The codes before it are in '.*checkpoint-2'"
    ):
        trainer.train()
    kept = PeftModel.from_pretrained(make_model(), Path(trainer.args.output_dir) / "checkpoint-2")
    assert torch.equal(steered_layers(kept)[0].yapo_code["default"], seen[0][0])
    resumed = build(max_steps=6, save_strategy="no", direction="both")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6


@pytest.mark.feature("Training", "`ref_model`", refused="the reference is the same model, unsteered")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": make_model()}, ConfigError, "no YaPO adapter to train: give peft_config"),
        ({"args": DPOConfig}, ConfigError, "args is a DPOConfig: YaPOTrainer takes a YaPOTrainingConfig"),
        ({"ref_model": make_model()}, UnsupportedOperationError, "ref_model is not supported"),
        ({"peft_config": "lora"}, ConfigError, "peft_config is a LoraConfig"),
        ({"frozen": True}, ConfigError, "adapter is frozen: load it with is_trainable=True"),
    ],
    ids=["no adapter", "other args", "reference model", "other method", "frozen"],
)
def test_bad_arguments_are_rejected(tmp_path, pairs, tokenizer, change, error, message):
    from peft import LoraConfig

    model = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae()))
    if change.get("frozen"):
        model.requires_grad_(False)
    config = change.get("args", YaPOTrainingConfig)
    args = config(output_dir=str(tmp_path), report_to="none", use_cpu=True, **{CHECKPOINTING: False})
    options = {"ref_model": change["ref_model"]} if "ref_model" in change else {}
    if "peft_config" in change:
        model, options["peft_config"] = make_model(), LoraConfig()
    with pytest.raises(error, match=message):
        YaPOTrainer(change.get("model", model), args, train_dataset=pairs, processing_class=tokenizer, **options)


@pytest.mark.feature(
    "Training", "Another method's adapter that would train along", refused="the objective is for codes alone"
)
@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT", "ignore:Already found a `peft_config`")
def test_trainable_adapter_of_another_method_is_rejected(build):
    model = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), make_model())
    steered = get_peft_model(model, YaPOConfig(layers=2, sae=make_sae()))
    with pytest.raises(ConfigError, match=r"layers.0.self_attn.q_proj' \(Linear\) holds another method's trainable"):
        build(steered)
    for name, parameter in steered.named_parameters():
        if ".lora_" in name:
            parameter.requires_grad_(False)
    build(steered)


@pytest.mark.parametrize(("unit", "rate", "least"), [("activation", 5e-5, 0.001), ("raw", 1e-6, 0.0001)])
def test_a_learning_rate_that_moves_nothing_is_warned_about(build, unit, rate, least):
    with pytest.warns(UserWarning, match=rf"learning_rate={rate} moves .* give at least {least}") as found:
        build(learning_rate=rate, learning_rate_unit=unit)
    (warned,) = (warning for warning in found if "learning_rate=" in str(warning.message))
    assert warned.filename.endswith("conftest.py")
    build(learning_rate=least, learning_rate_unit=unit)


def test_a_tokenizer_without_an_end_is_named(build, tokenizer):
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    rows = Dataset.from_list([{"prompt": "w1 ", "chosen": "w2", "rejected": "w3"}] * 4)
    with pytest.raises(ConfigError, match=r"no eos_token, which ends each answer: set tokenizer\.eos_token"):
        build(train_dataset=rows, init={"processing_class": endless})


CHECKPOINTS = {
    "another SAE": ({"sae": make_sae(seed=77)}, None, SAEMismatchError, "a code is only valid for the SAE"),
    "other tokens": ({"positions": "last"}, None, ConfigError, "was trained with positions='all'"),
    "a truncated file": ({}, "adapter_model.safetensors", AdapterFileError, "is truncated"),
}


@pytest.mark.feature(
    "Training", "Resuming on another SAE or other `positions`, or from a truncated file", refused="named"
)
@pytest.mark.parametrize("case", CHECKPOINTS)
def test_mismatched_checkpoints_are_rejected(build, tmp_path, case):
    adapter, truncated, error, message = CHECKPOINTS[case]
    build(save_strategy="steps", save_steps=2, max_steps=2).train()
    if truncated:
        file = tmp_path / "out" / "checkpoint-2" / truncated
        file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(error, match=message):
        build(adapter=adapter, max_steps=4).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


@pytest.mark.feature("Training", "Resuming skips a checkpoint that a killed process left incomplete, and says so")
@pytest.mark.parametrize(
    "name", ["trainer_state.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
)
def test_resuming_skips_an_incomplete_checkpoint(build, tmp_path, capsys, name):
    whole = build(save_strategy="steps", save_steps=2, max_steps=6)
    whole.train()
    expected = trained_codes(whole)
    for step in (4, 6):
        file = tmp_path / "out" / f"checkpoint-{step}" / name
        file.write_bytes(file.read_bytes()[:-20])
    if name == "trainer_state.json":
        file.unlink()
    with pytest.raises(AdapterFileError, match=rf"checkpoint-6' is incomplete: .*{name}"):
        build(max_steps=6).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-6"))
    (tmp_path / "out" / "checkpoint-6-best").mkdir()
    capsys.readouterr()
    resumed = build(save_strategy="no", max_steps=6)
    resumed.train(resume_from_checkpoint=True)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Skipping")]
    assert len(said) == 2
    assert all(name in line for line in said)
    assert torch.equal(trained_codes(resumed), expected)
    (tmp_path / "out" / "checkpoint-2" / "trainer_state.json").write_text("{")
    with pytest.raises(AdapterFileError, match=r"No checkpoint in .* is whole"):
        build(max_steps=6).train(resume_from_checkpoint=True)


def test_a_checkpoint_without_the_state_of_the_optimizer_is_not_resumed(build, tmp_path):
    build(save_strategy="steps", save_steps=2, max_steps=2, save_only_model=True).train()
    for given in (True, str(tmp_path / "out" / "checkpoint-2")):
        with pytest.raises(ConfigError, match=r"has no optimizer.pt .save_only_model=True.*would be another run"):
            build(max_steps=4).train(resume_from_checkpoint=given)


@pytest.mark.parametrize("metric", ["loss/plus", "eval_loss/minus", "margin/minus", "eval_accuracy/minus"])
def test_metrics_that_should_fall_are_better_when_they_are_lower(tmp_path, metric):
    options = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "metric_for_best_model": metric}
    assert YaPOTrainingConfig(**options).greater_is_better is False
    assert YaPOTrainingConfig(**options, greater_is_better=True).greater_is_better is True
    assert YaPOTrainingConfig(**options | {"metric_for_best_model": "accuracy/plus"}).greater_is_better is True


@pytest.mark.parametrize(
    "read",
    [
        lambda model, rows, tokenizer, build: sweep(model, rows, tokenizer, [1.0]),
        lambda model, rows, tokenizer, build: measure_contrast(model, rows, tokenizer),
        lambda model, rows, tokenizer, build: build(model, train_dataset=Dataset.from_list(rows)),
        lambda model, rows, tokenizer, build: build(model).evaluate(Dataset.from_list(rows)),
        lambda model, rows, tokenizer, build: sweep(model, rows, tokenizer, [1.0], measure=Repetition()),
    ],
    ids=["sweep", "measure_contrast", "training", "evaluation", "answers"],
)
def test_rows_longer_than_the_context_are_named_before_any_work(build, tokenizer, pairs, read):
    model = get_peft_model(make_model("gpt2"), YaPOConfig(layers=2, space="dense"))
    rows = [{**pairs[0], "prompt": [{"role": "user", "content": " ".join(["w1"] * 300)}]}]
    with pytest.raises(ConfigError, match=r"has \d+ tokens, but the model takes at most 256: shorten it"):
        read(model, rows, tokenizer, build)
