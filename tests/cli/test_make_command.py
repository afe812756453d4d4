"""`yapo make`."""

import json

import pytest
from datasets import load_dataset
from tiny import inference_sae, make_attentive_model, make_sae

from yapo_cli import make
from yapo_peft.scripts.arguments import parse
from yapo_peft.scripts.yapo import main as train

WORDS = [f"w{n}" for n in range(50, 90)]


@pytest.mark.feature("Commands", "`yapo make`: an adapter from two descriptions")
@pytest.mark.usefixtures("few_neutral_rows")
def test_an_adapter_is_made_and_an_interrupted_run_goes_on(run, tmp_path, tokenizer, monkeypatch):
    make_attentive_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    inference_sae(make_sae(), tmp_path / "sae")
    (tmp_path / "questions.txt").write_text("\n".join(f"w{n} w{n + 1}" for n in range(20)))
    out, launched = tmp_path / "out", []

    def fail(arguments):
        launched.append(arguments)
        return 1

    def in_this_process(arguments):
        launched.append(arguments)
        train(*parse([*arguments, "--max_steps", "2", "--use_cpu"])[0])
        return 0

    command = ["make", tmp_path / "base", "--towards", " ".join(WORDS[:20]), "--away", " ".join(WORDS[20:])]
    command += ["--layers", 2, "--sae-path", tmp_path / "sae", "--questions", tmp_path / "questions.txt"]
    command += ["--features", 4, "--max-kl", 0.001, "--max-new-tokens", 5, "--out", out]
    far = ["99" if argument == 2 else argument for argument in command]
    status, _, said = run(*far)
    assert (status, "--layers 99: " in said, "has layers 0 to" in said, out.exists()) == (2, True, True, False)
    monkeypatch.setattr(make, "launch", fail)
    assert run(*command)[0] == 1
    pairs = [
        load_dataset("parquet", data_files=str(out / f"{part}.parquet"), split="train") for part in ("train", "test")
    ]
    assert len(pairs[0]) > 3 * len(pairs[1]) > 0
    (answers,) = (out / "pairs" / "answers").glob("*")
    answers.unlink()  # the pairs are there, and answered no more
    monkeypatch.setattr(make, "launch", in_this_process)
    status, printed, said = run(*command)
    assert status == 0, said
    assert not answers.exists()
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (config["layers"], config["space"]) == ([2], "sae")
    assert "## Features" in (out / "adapter" / "README.md").read_text()
    assert (out / "report.html").stat().st_size > 10_000
    assert f"The adapter is in {out / 'adapter'}" in printed
    assert launched[0] == launched[1]
    assert run(*command)[0] == 0
    assert len(launched) == 2
    status, _, said = run(*command, "--limit", 10)
    assert status == 2
    assert "has results of another run (limit: None before, 10 now)" in said
