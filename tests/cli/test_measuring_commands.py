"""`yapo sweep --measure`, `yapo answers` and `yapo culture` give the same results as the library."""

import json
import math

import pandas as pd
import pytest
from datasets import load_dataset
from peft import AutoPeftModelForCausalLM

from yapo_cli.output import print_table
from yapo_peft import Scores, steering, sweep
from yapo_peft.data import load_choices
from yapo_peft.evaluation import GeneratedChoice, Judge, MultipleChoice, cultural_scores
from yapo_peft.scoring.generation import answer
from yapo_peft.scoring.pairs import prompt_ids

QUESTIONS = [
    {"question": f"w{i} w{i + 1}", "options": ["w3", "w4 w5"], "answer": i % 2, "country": c, "localization_status": s}
    for i, (c, s) in enumerate((c, s) for c in ("UK", "Iran") for s in ("localized", "nolocalized") for _ in range(3))
]


@pytest.fixture
def questions_file(tmp_path):
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    return tmp_path / "questions.jsonl"


def load(folder):
    return AutoPeftModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.feature("Commands", "`yapo sweep --measure` preference, choice, generated, repetition, judge, damage")
def test_sweep_of_generated_answers_matches_the_library(run, saved_adapter, tokenizer, questions_file):
    options = ("--dataset", questions_file, "--multipliers", "0,2", "--json")
    status, printed, stderr = run("sweep", saved_adapter, *options, "--measure", "generated", "--max-new-tokens", 4)
    assert status == 0, stderr
    rows = load_choices(questions_file)
    expected = sweep(load(saved_adapter), rows, tokenizer, (0, 2), measure=GeneratedChoice(), max_new_tokens=4)
    pd.testing.assert_frame_equal(pd.DataFrame(json.loads(printed)), expected.summary(), check_dtype=False)


def test_intervals_are_printed_behind_their_values(capsys):
    rows = {"multiplier": [0.0, 1.0], "margin": [0.51234, math.nan], "margin_low": [-1.0, math.nan]}
    print_table(pd.DataFrame({**rows, "margin_high": [2.0, math.nan], "examples": 7}), as_json=False)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["multiplier", "margin", "examples"]
    assert lines[1:] == [["0", "0.5123", "[-1,", "2]", "7"], ["1", "7"]]


def test_sweep_asks_the_judge_that_is_named(run, saved_adapter, pairs_file, monkeypatch, tmp_path):
    asked = []

    def score(self, dataset, examples, answers):
        asked.append((self.behaviour, self.opposite, self.client.model, self.model, len(answers)))
        return [{"score": 3.0} for _ in answers]

    monkeypatch.setattr(Judge, "score_answers", score)
    options = ("--dataset", pairs_file, "--multipliers", "0,1", "--max-new-tokens", 2, "--limit", 2, "--json")
    judge = ("--measure", "judge", "--judge-url", "http://localhost:1/v1", "--judge-model", "j")
    status, printed, stderr = run(
        "sweep", saved_adapter, *options, *judge, "--behaviour", "praises tea", "--opposite", "is silent"
    )
    assert status == 0, stderr
    assert [row["score"] for row in json.loads(printed)] == [3.0, 3.0]
    assert asked == [("praises tea", "is silent", "http://localhost:1/v1", "j", 4)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--measure", "judge", "--behaviour", "x"), "needs --judge-url"),
        (("--measure", "judge", "--judge-url", "http://x"), "needs --behaviour"),
        (("--measure", "judge", "--judge-url", "http://x", "--behaviour", "tea"), "must be one of 'power-seeking'"),
        (("--behaviour", "coherence"), "--behaviour: --measure preference does not read it"),
        (("--measure", "choice", "--max-new-tokens", "3"), "--measure choice does not generate"),
        (("--measure", "repetition", "--chosen", "x"), "--measure repetition does not read it"),
    ],
)
def test_sweep_names_options_that_a_measure_needs_or_does_not_read(run, options, message):
    status, _, stderr = run("sweep", "a", "--dataset", "pairs.csv", *options)
    assert status == 2
    assert message in " ".join(stderr.replace("│", " ").split())


@pytest.mark.feature("Commands", "`yapo answers`: answers of several adapters and multipliers, side by side")
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_answers_are_those_of_each_adapter(run, saved_adapter, tokenizer, pairs, pairs_file, tmp_path, suffix):
    fit = ("--dataset", pairs_file, "--model", tmp_path / "base", "--layers", 1, "--out", tmp_path / "caa")
    assert run("fit", "caa", *fit)[0] == 0
    out = tmp_path / f"answers.{suffix}"
    options = ("--dataset", pairs_file, "--limit", 3, "--max-new-tokens", 4, "--multipliers", "0,2", "--out", out)
    status, printed, stderr = run("answers", saved_adapter, tmp_path / "caa", *options)
    assert status == 0, stderr
    assert "Saved 3 prompts with 3 answers each" in printed
    kind = {"jsonl": "json"}.get(suffix, suffix)
    found = load_dataset(kind, data_files=str(out), split="train")
    assert found.column_names == ["prompt", "unsteered", "adapter at +2", "caa at +2"]
    assert found["prompt"][:] == pairs["prompt"][:3]
    for folder, multiplier, column in (
        (saved_adapter, 0.0, "unsteered"), (saved_adapter, 2.0, "adapter at +2"), (tmp_path / "caa", 2.0, "caa at +2"),
    ):  # fmt: skip
        model = load(folder)
        for prompt, said in zip(found["prompt"], found[column], strict=True):
            with steering(model, multiplier):
                ids = prompt_ids(prompt, tokenizer)
                assert answer(model, tokenizer, [ids], max_new_tokens=4, do_sample=False)[0][0] == said


def test_answers_rejects_other_kinds_of_files(run):
    status, _, stderr = run("answers", "a", "--dataset", "x.csv", "--out", "answers.csv")
    assert status == 2
    assert "must be a file that ends in .jsonl" in " ".join(stderr.replace("│", " ").split())


@pytest.mark.feature("Commands", "`yapo culture`: accuracy, RCA and PNLG by country")
def test_culture_matches_the_library(run, saved_adapter, tokenizer, questions_file):
    options = ("--dataset", questions_file, "--multipliers", "0,3", "--json")
    status, printed, stderr = run("culture", saved_adapter, *options)
    assert status == 0, stderr
    model, parts = load(saved_adapter), []
    for country in ("UK", "Iran"):
        for status in ("localized", "nolocalized"):
            rows = [r for r in QUESTIONS if (r["country"], r["localization_status"]) == (country, status)]
            scores = sweep(model, rows, tokenizer, (0, 3), measure=MultipleChoice("text", "characters"))
            kind = "nonlocalized" if status == "nolocalized" else status
            parts.append(scores.labelled(country=country, localization_status=kind))
    expected = cultural_scores(Scores.concat(parts))
    found = pd.DataFrame(json.loads(printed))[expected.columns.tolist()]
    pd.testing.assert_frame_equal(found.astype(expected.dtypes), expected)


def test_culture_names_other_kinds_of_questions(run, saved_adapter, questions_file):
    questions_file.write_text(questions_file.read_text().replace("nolocalized", "global"))
    status, _, stderr = run("culture", saved_adapter, "--dataset", questions_file)
    assert status == 2
    assert "The column 'localization_status' has 'global'" in stderr
