"""The training script, started in each supported way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import AutoPeftModelForCausalLM
from tiny import make_model, preference_rows, random_ids

from yapo_cli.pairs import TrainingPairs
from yapo_peft import ConfigError, DatasetError, YaPOConfig, YaPOTrainer, YaPOTrainingConfig
from yapo_peft.scripts.arguments import SteeringArguments, make_parser, parse
from yapo_peft.tuner.adapters import steered_layers

# Without a GPU, accelerate's launcher for several of them starts processes that talk through gloo.
STARTS = {
    "python -m": [sys.executable, "-m", "yapo_peft.scripts.yapo"],
    "accelerate launch": [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "-m", "yapo_peft.scripts.yapo"],
    "yapo train, 2 processes": [sys.executable, "-m", "yapo_peft", "train", "--multi_gpu", "--num_processes", "2"],
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tokenizer):
    """A folder with a model, an SAE, data, and a config as one would write it for `trl dpo`."""
    from tiny import inference_sae, make_sae

    folder = tmp_path_factory.mktemp("workplace")
    make_model().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    inference_sae(make_sae(), folder / "sae")
    (folder / "data").mkdir()
    for split, count in (("train", 8), ("test", 4)):
        lines = [json.dumps(row) for row in preference_rows(count)]
        (folder / "data" / f"{split}.jsonl").write_text("\n".join(lines))
    config = {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "data"),
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "max_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "use_peft": True,
    }
    # JSON is YAML.
    (folder / "dpo.yaml").write_text(json.dumps(config))
    return folder


def arguments(workplace: Path, out: Path, pairs: int, config: str = "dpo.yaml") -> list[str]:
    steering = ["--layers", "2", "--sae_path", str(workplace / "sae")]
    batch = ["--per_device_train_batch_size", str(pairs)]
    return ["--config", str(workplace / config), *steering, *batch, "--output_dir", str(out)]


@pytest.fixture(scope="module")
def trained(workplace):
    """The adapter that each way to start the script trains, and what it logged."""
    results = {}
    for name, start in STARTS.items():
        out = workplace / name.replace(" ", "-")
        command = [*start, *arguments(workplace, out, pairs=2 if "2 processes" in name else 4)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert run.returncode == 0, run.stderr[-3000:]
        model = AutoPeftModelForCausalLM.from_pretrained(out)
        state = json.loads((out / "checkpoint-3" / "trainer_state.json").read_text())
        results[name] = (steered_layers(model)[0].yapo_code["default"].detach(), state["log_history"], model)
    return results


@pytest.mark.slow
@pytest.mark.feature(
    "TRL", "A script like `trl dpo`: `python -m yapo_peft.scripts.yapo`, `accelerate launch -m`, `yapo train`"
)
@pytest.mark.parametrize("name", STARTS)
def test_script_trains_the_same_adapter_however_it_is_started(trained, name):
    code, log, model = trained[name]
    expected, expected_log, _ = trained["python -m"]
    assert code.any()
    torch.testing.assert_close(code, expected, rtol=1e-4, atol=2e-5)
    for key in ("loss", "eval_loss", "eval_accuracy/plus"):
        ours, theirs = ([entry[key] for entry in history if key in entry] for history in (log, expected_log))
        assert ours
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert model(random_ids()).logits.isfinite().all()


@pytest.mark.slow
@pytest.mark.feature("Many processes", "`yapo train --accelerate_config fsdp2`", needs="two GPUs (as accelerate says)")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_fsdp2_through_accelerate(workplace):
    # With a bound, only codes that are not sharded start from an estimate.
    without_bound = json.loads((workplace / "dpo.yaml").read_text()) | {"max_kl": None}
    (workplace / "without_bound.yaml").write_text(json.dumps(without_bound))
    codes = []
    for options, pairs in ((["--accelerate_config", "fsdp2", "--num_processes", "2"], 2), ([], 4)):
        out = workplace / f"fsdp2-{pairs}"
        command = [
            sys.executable,
            "-m",
            "yapo_peft",
            "train",
            *options,
            *arguments(workplace, out, pairs, "without_bound.yaml"),
        ]
        command += ["--use_cpu", "False"]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr[-3000:]
        (layer,) = steered_layers(AutoPeftModelForCausalLM.from_pretrained(out))
        codes.append(layer.yapo_code["default"].detach())
    torch.testing.assert_close(*codes, rtol=1e-2, atol=1e-4)


def parsed(*arguments):
    return parse(list(arguments))[0]


def test_parser_takes_the_flags_of_trl_and_of_the_adapter():
    _, training, model, *_, steering = parsed(
        *("--model_name_or_path", "m", "--beta", "0.2", "--direction", "both", "--output_dir", "x"),
        *("--layers", "-1", "3", "--sae_release", "r", "--sae_id", "a", "b", "--positions", "last"),
    )
    assert (model.model_name_or_path, training.beta, training.direction) == ("m", 0.2, "both")
    config = steering.config()
    assert (config.layers, config.sae_release, config.sae_id) == ([-1, 3], "r", ["a", "b"])
    assert config.positions == "last"


def test_published_hyper_parameters_are_defaults_that_arguments_override(workplace):
    required = ("--output_dir", "x", "--layers", "2", "--sae_path", "y")
    _, training, *_ = parsed(*required, "--published", "--learning_rate", "0.2")
    assert (training.direction, training.max_kl, training.num_train_epochs) == ("batch", None, 20)
    assert (training.learning_rate, training.learning_rate_unit) == (0.2, "raw")
    _, training, *_ = parsed(*required, "--published", "--config", str(workplace / "dpo.yaml"))
    assert (training.learning_rate, training.warmup_steps, training.adam_epsilon) == (0.1, 0, 1e-8)
    assert parsed(*required)[1].max_kl == YaPOTrainingConfig.max_kl


def test_help_describes_each_option_as_its_config_does():
    shown = {action.dest: action.help for action in make_parser()._actions}
    for name in [*SteeringArguments.__annotations__, *YaPOTrainingConfig.__annotations__]:
        assert len(shown[name]) > 20, name
    assert shown["multiplier"].startswith("Multiplier with which a loaded adapter starts: 1 as trained, 0 off")
    assert shown["activation_cache_dtype"].endswith("the model's by default.")
    assert shown["direction"].endswith("(twice the forward passes, and no noise from the draw).")


@pytest.mark.parametrize("config", [YaPOConfig, YaPOTrainingConfig])
def test_each_field_of_a_config_is_described(config):
    described = [name for name, field in config.__dataclass_fields__.items() if field.metadata.get("help")]
    assert set(config.__annotations__) <= set(described)


GOOD = ("--model_name_or_path", "m", "--layers", "2", "--sae_path", "s", "--output_dir", "x", "--bf16", "False")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--lora_r", "32"), "lora_r=32 belongs to LoRA"),
        (("--use_dora",), "use_dora=True belongs to LoRA"),
        ((), "nothing to train on: give --dataset, --dataset_name"),
        (("--dataset", "a", "--dataset_name", "b"), "dataset and dataset_name are given: keep one"),
        (("--dataset_name", __file__), "is a file or a saved dataset: pass it with --dataset"),
        (("--dataset_name", "b", "--system", "x"), "--system x: it is read with --dataset only"),
        (("--dataset", "b", "--dataset_test_split", "x"), "dataset_test_split='x' is read with dataset_name only"),
        (("--learning_rate", "-1"), "learning_rate=-1.0: must be a finite number"),
        (("--num_proceses", "2"), "'num_proceses' is not an option .* did you mean num_processes"),
        (("--method", "bipo", "--space", "sae"), "method=bipo makes no adapter of space='sae'"),
        (("--method", "sas", "--space", "dense"), "method=sas makes no adapter of space='dense'"),
        (("--positions", "first"), "positions='first'"),
    ],
)
def test_bad_options_are_rejected_before_anything_is_loaded(options, message):
    from yapo_peft.scripts.yapo import main

    with pytest.raises(ConfigError, match=message):
        main(*parsed(*GOOD, *options))


def test_misspelt_keys_of_a_yaml_config_are_named(tmp_path):
    (tmp_path / "config.yaml").write_text("learning_rat: 0.1\nnum_processes: 1\n")
    with pytest.raises(ConfigError, match=r"'learning_rat' is not an option .* did you mean learning_rate"):
        parsed(*GOOD, "--config", str(tmp_path / "config.yaml"))


def test_a_split_of_the_dataset_is_one_to_evaluate_on(tmp_path, tokenizer):
    parts = {name: Dataset.from_list([{"prompt": name, "chosen": "w2", "rejected": "w3"}]) for name in ("train", "dev")}
    DatasetDict(parts).save_to_disk(tmp_path / "saved")
    _, test = TrainingPairs(str(tmp_path / "saved"), plain=True, eval_split="dev").load_both(tokenizer, seed=0)
    assert test["prompt"] == ["dev"]
    with pytest.raises(DatasetError, match="no split 'test'"):
        TrainingPairs(str(tmp_path / "saved"), eval_split="test").load_both(tokenizer, seed=0)


def test_a_share_of_the_pairs_or_another_file_is_held_out(tmp_path, tokenizer):
    for name, first in (("a", 0), ("b", 100)):
        rows = [{"prompt": f"w{first + i}", "chosen": "w2", "rejected": "w3"} for i in range(10)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def load(eval_split):
        pairs = TrainingPairs(str(tmp_path / "a.jsonl"), eval_split=eval_split)
        return [part and [row["prompt"][0]["content"] for row in part] for part in pairs.load_both(tokenizer, seed=0)]

    train, test = load("0.3")
    assert (len(train), len(test), len({*train, *test})) == (7, 3, 10)
    assert load("0.3") == [train, test]
    assert load(None) == [[f"w{i}" for i in range(10)], None]
    assert load(str(tmp_path / "b.jsonl"))[1] == [f"w{100 + i}" for i in range(10)]
    for share in ("0", "1", "0.01", "nan"):
        with pytest.raises(ConfigError, match=f"eval_split={share} of 10 pairs: must be a share"):
            load(share)


@pytest.mark.feature("TRL", "`yapo train --method`: YaPO, BiPO, RePS, CAA or SAS")
@pytest.mark.parametrize(
    ("method", "space", "loss"),
    [("yapo", "sae", "sigmoid"), ("bipo", "dense", "sigmoid"), ("reps", "sae", "reps"), ("caa", "dense", "sigmoid")],
)
def test_a_method_is_one_word(method, space, loss):
    *_, steering = found = parsed(*GOOD, "--method", method)
    assert (steering.config().space, found[1].loss_type) == (space, [loss])
    assert steering.config().sae_path == (["s"] if space == "sae" else None)


@pytest.mark.parametrize("method", ["caa", "sas"])
def test_what_is_not_trained_is_fitted_and_calibrated(workplace, tmp_path, method):
    from yapo_peft.scripts.yapo import main

    options = [*GOOD, "--model_name_or_path", str(workplace / "model"), "--sae_path", str(workplace / "sae")]
    options += ["--dataset", str(workplace / "data" / "train.jsonl"), "--output_dir", str(tmp_path / "out")]
    main(*parsed(*options, "--use_cpu", "--method", method, "--max_kl", "0.001"))
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.peft_config["default"].space == {"caa": "dense", "sas": "sae"}[method]
    assert max(model.peft_config["default"].damage.values()) == pytest.approx(0.001, rel=0.05)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| method | {method} |" in card
    assert "| dataset | train.jsonl |" in card
    assert "apply_chat_template" in card
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_what_would_be_in_vain_is_refused_before_anything_is_loaded():
    from yapo_peft.scripts.yapo import main

    for options, message in (
        (("--resume_from_checkpoint", "nothere"), "resume_from_checkpoint='nothere' is not a folder"),
        (("--method", "caa", "--push_to_hub", "True"), "push_to_hub with method=caa"),
        (("--tau", "0.5"), "tau=0.5: it is read by method=sas only"),
    ):
        with pytest.raises(ConfigError, match=message):
            main(*parsed(*GOOD, "--model_name_or_path", "nowhere", *options))
    with pytest.raises(ConfigError, match=r"cannot be read: .*nothere\.yaml"):
        parse([*GOOD, "--config", "nothere.yaml"])


def recorded(step, steps):
    def training_step(self, *arguments, **options):
        steps.append(self.state.global_step)
        return step(self, *arguments, **options)

    return training_step


def test_true_resumes_from_the_last_checkpoint(workplace, tmp_path, monkeypatch):
    from yapo_peft.scripts.yapo import main

    options = [*GOOD, "--model_name_or_path", str(workplace / "model"), "--sae_path", str(workplace / "sae")]
    options += ["--dataset", str(workplace / "data" / "train.jsonl"), "--output_dir", str(tmp_path / "out")]
    options += ["--use_cpu", "--save_strategy", "steps", "--save_steps", "1", "--logging_steps", "1"]
    options += ["--report_to", "none", "--published"]
    main(*parsed(*options, "--max_steps", "1"))
    steps = []
    monkeypatch.setattr(YaPOTrainer, "training_step", recorded(YaPOTrainer.training_step, steps))
    main(*parsed(*options, "--max_steps", "3", "--resume_from_checkpoint", "True"))
    assert steps == [1, 2]
    assert "| dataset | train.jsonl |" in (tmp_path / "out" / "README.md").read_text()


def test_missing_split_lists_the_available_ones(workplace):
    from yapo_peft.scripts.yapo import main

    options = ("--dataset_name", str(workplace / "data"), "--dataset_train_split", "training")
    with pytest.raises(ConfigError, match="no split 'training' but 'train', 'test'"):
        main(*parsed(*GOOD, *options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "yapo train: There is no layer to steer: give --layers"),
        (("--layers", "2", "--sae_path", "s", "--positions", "x"), "yapo train: --positions 'x'"),
    ],
)
def test_command_rejects_bad_options_before_launching(capsys, options, message):
    from yapo_cli import main

    assert main(["train", "--model_name_or_path", "m", "--output_dir", "x", "--bf16", "False", *options]) == 2
    assert capsys.readouterr().err.startswith(message)


def test_command_exits_with_the_error_of_the_script(workplace):
    command = [sys.executable, "-m", "yapo_peft", "train", *arguments(workplace, workplace / "no", pairs=4)]
    run = subprocess.run([*command, "--dataset_train_split", "training"], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "no split 'training'" in run.stderr.splitlines()[-1]


def test_a_loss_that_contradicts_the_method_is_refused():
    with pytest.raises(ConfigError, match=r"method=reps and loss_type=\['sigmoid'\] contradict"):
        parsed(*GOOD, "--method", "reps", "--loss_type", "sigmoid")
