import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_dataset
from peft import get_peft_model
from tiny import make_model, make_sae, preference_rows, random_code, set_code

from yapo_peft import ConfigError, DatasetError, YaPOConfig, set_multiplier
from yapo_peft.data import generate_rejected
from yapo_peft.scoring.pairs import prompt_ids

PROMPTS = Dataset.from_list([{k: row[k] for k in ("prompt", "chosen")} for row in preference_rows(11)])
OPTIONS = {"max_new_tokens": 6, "batch_size": 2, "shard_size": 4}


def one_at_a_time(model, tokenizer, dataset):
    """Greedy answers without batches, and so without padding."""
    found = []
    for prompt in dataset["prompt"]:
        ids = torch.tensor([prompt_ids(prompt, tokenizer)])
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0
        )
        found.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return found


@pytest.mark.feature("Data", "On-policy rejected answers, batched and padded on the left")
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_batched_answers_match_single_prompts(tmp_path, tokenizer, architecture):
    model = make_model(architecture)
    pairs = generate_rejected(model, tokenizer, PROMPTS, tmp_path, **OPTIONS, do_sample=False)
    expected = one_at_a_time(model, tokenizer, PROMPTS)
    assert [pair["rejected"][0]["content"] for pair in pairs] == expected
    assert [pair["prompt"] for pair in pairs] == PROMPTS["prompt"]
    assert pairs.column_names == ["prompt", "chosen", "rejected", "finished"]


def test_active_adapter_steers_answers(tmp_path, tokenizer):
    model = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae()))
    set_code(model, random_code(scale=3.0))
    steered = generate_rejected(model, tokenizer, PROMPTS, tmp_path / "a", **OPTIONS)
    with model.disable_adapter():
        plain = generate_rejected(model, tokenizer, PROMPTS, tmp_path / "b", **OPTIONS)
    assert steered["rejected"] != plain["rejected"]
    set_multiplier(model, 0.5)
    with pytest.raises(ConfigError, match=r"has results of another run .*model"):
        generate_rejected(model, tokenizer, PROMPTS, tmp_path / "a", **OPTIONS)


def test_plain_prompts_yield_plain_answers(tmp_path, tokenizer):
    rows = Dataset.from_list([{k: row[k] for k in ("prompt", "chosen")} for row in preference_rows(4, False)])
    pairs = generate_rejected(make_model(), tokenizer, rows, tmp_path, **OPTIONS)
    assert all(isinstance(answer, str) and answer for answer in pairs["rejected"])


class Stopped(Exception):
    pass


@pytest.mark.parametrize("sample", [False, True])
def test_interrupted_run_resumes(tmp_path, tokenizer, monkeypatch, sample):
    model, options = make_model(), {**OPTIONS, "do_sample": sample}
    whole = generate_rejected(model, tokenizer, PROMPTS, tmp_path / "whole", **options)
    generate, calls = model.generate, []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise Stopped
        return generate(*args, **kwargs)

    monkeypatch.setattr(model, "generate", stopping)
    with pytest.raises(Stopped):
        generate_rejected(model, tokenizer, PROMPTS, tmp_path / "part", **options)
    assert [file.name for file in (tmp_path / "part" / "answers").iterdir()] == ["00000-of-00003.jsonl"]
    assert not list((tmp_path / "part").glob("pairs-*"))
    torch.rand(3)  # unrelated random numbers make no difference
    resumed = generate_rejected(model, tokenizer, PROMPTS, tmp_path / "part", **options)
    assert resumed.to_list() == whole.to_list()
    assert len(calls) == 4 + 4  # the second shard again, and the third
    again = generate_rejected(model, tokenizer, PROMPTS, tmp_path / "part", **options)
    assert len(calls) == 8
    assert again.to_list() == whole.to_list()


def test_sampled_answers_are_reproducible(tmp_path, tokenizer):
    options = {**OPTIONS, "do_sample": True, "temperature": 5.0}
    answers = [
        generate_rejected(make_model(), tokenizer, PROMPTS, tmp_path / str(i), **options, seed=seed)["rejected"]
        for i, seed in enumerate((0, 0, 1))
    ]
    assert answers[0] == answers[1] != answers[2]


def test_pairs_are_saved_as_parquet_shards(tmp_path, tokenizer):
    pairs = generate_rejected(make_model(), tokenizer, PROMPTS, tmp_path, **OPTIONS)
    files = sorted(str(file) for file in tmp_path.glob("pairs-*.parquet"))
    assert [Path(file).name for file in files] == [f"pairs-0000{i}-of-00003.parquet" for i in range(3)]
    read = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert read.to_list() == pairs.to_list()


def test_uninformative_answers_are_dropped(tmp_path, tokenizer, capsys):
    model = make_model()
    (first, second, *_) = one_at_a_time(model, tokenizer, PROMPTS)
    rows = PROMPTS.select([0, 1, 2]).to_list()
    rows[0]["chosen"][0]["content"] = f" {first.upper()} "
    rows += [dict(rows[1])]
    pairs = generate_rejected(model, tokenizer, Dataset.from_list(rows), tmp_path, **OPTIONS)
    assert len(pairs) == 2
    assert second in [pair["rejected"][0]["content"] for pair in pairs]
    assert (
        "Created 2 pairs from 4 answers; dropped 0 empty, 1 equal to the chosen one, 1 duplicate"
        in capsys.readouterr().out
    )


def test_finished_tells_truncated_answers(tmp_path, tokenizer):
    model = make_model()
    pairs = generate_rejected(model, tokenizer, PROMPTS, tmp_path, **OPTIONS)
    assert not any(pairs["finished"])
    first = tokenizer(pairs[0]["rejected"][0]["content"])["input_ids"][2]
    ended = generate_rejected(model, tokenizer, PROMPTS, tmp_path / "ended", **OPTIONS, eos_token_id=first)
    assert ended[0]["finished"]
    assert len(ended[0]["rejected"][0]["content"].split()) == 3


@pytest.mark.parametrize(
    ("rows", "options", "error", "message"),
    [
        (PROMPTS.select([]), {}, DatasetError, "The dataset is empty"),
        (PROMPTS.remove_columns("chosen"), {}, DatasetError, "no column 'chosen': name one of its columns 'prompt'"),
        (Dataset.from_list([{"prompt": "w1", "chosen": None}]), {}, DatasetError, "Row 0 has chosen=None"),
        (PROMPTS, {"batch_size": 0}, ConfigError, "batch_size=0"),
        (PROMPTS, {"max_length": 9}, ConfigError, "omit max_length"),
        (PROMPTS, {"num_return_sequences": 2}, ConfigError, "omit max_length"),
    ],
)
def test_invalid_input_raises_before_generating(tmp_path, tokenizer, rows, options, error, message):
    with pytest.raises(error, match=message):
        generate_rejected(make_model(), tokenizer, rows, tmp_path / "out", **OPTIONS | options)
    assert not (tmp_path / "out").exists()


def test_generate_rejected_rejects_folder_of_another_run(tmp_path, tokenizer):
    generate_rejected(make_model(), tokenizer, PROMPTS, tmp_path, **OPTIONS)
    with pytest.raises(ConfigError, match=r"another run .*seed: 0 before, 1 now"):
        generate_rejected(make_model(), tokenizer, PROMPTS, tmp_path, **OPTIONS, seed=1)
    with pytest.raises(ConfigError, match=r"another run .*prompts"):
        generate_rejected(make_model(), tokenizer, PROMPTS.select([1, 2]), tmp_path, **OPTIONS)


@pytest.mark.slow
@pytest.mark.feature("Data", "On-policy rejected answers on several processes")
def test_two_processes_match_one(tmp_path, tokenizer):
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"q": row["prompt"][0]["content"], "a": row["chosen"][0]["content"]} for row in PROMPTS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = (
        f"--model {tmp_path / 'model'} --dataset {tmp_path / 'rows.jsonl'} --prompt q --chosen a --max-new-tokens 6 "
        "--batch-size 2 --shard-size 4"
    ).split()
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    module = ["-m", "yapo_cli", "data", "reject", *arguments, "--output-dir"]
    for name, command in (
        ("one", [sys.executable]),
        ("two", [*launch, "--mixed_precision", "no", "--dynamo_backend", "no"]),
    ):
        run = subprocess.run([*command, *module, str(tmp_path / name)], capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr[-2000:]
    pairs = [sorted((tmp_path / name).glob("pairs-*.parquet")) for name in ("one", "two")]
    one, two = (
        load_dataset("parquet", data_files=list(map(str, p)), split="train", cache_dir=str(tmp_path)) for p in pairs
    )
    assert one.to_list() == two.to_list()
    assert len(one) == len(PROMPTS)
