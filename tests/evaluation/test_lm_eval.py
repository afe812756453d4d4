import functools
import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, get_peft_model
from tiny import make_model, make_sae

from yapo_cli import main
from yapo_peft import ConfigError, Scores, UnsupportedOperationError, YaPOConfig, steering
from yapo_peft.evaluation import evaluate_tasks, lm_eval, sweep_tasks

DOCUMENTS = [{"q": f"w{3 * i} w{i + 1}", "o": [f"w{i + 5} w3", f"w{i + 9} w7"], "a": i % 2} for i in range(8)]


@pytest.fixture(autouse=True, scope="module")
def _one_index():
    """Shares one task index, because lm-eval parses thousands of files to build it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval, "task_manager", functools.cache(lm_eval.task_manager))
        yield


@pytest.fixture
def task(tmp_path):
    """An lm-eval multiple-choice task on a local file."""
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DOCUMENTS))
    return {
        "task": "own_choices",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "documents.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{o}}",
        "doc_to_target": "{{a}}",
        "metric_list": [{"metric": "acc"}],
    }


@torch.no_grad()
def slow_accuracies(model, tokenizer, multiplier):
    found = []
    for row in DOCUMENTS:
        scores = []
        for option in row["o"]:
            before, own = (tokenizer(text)["input_ids"] for text in (row["q"], option))
            with steering(model, multiplier):
                logps = model(input_ids=torch.tensor([before + own])).logits[0].log_softmax(-1)
            scores.append(sum(float(logps[len(before) - 1 + i, token]) for i, token in enumerate(own)))
        found.append(float(scores.index(max(scores)) == row["a"]))
    return found


@pytest.mark.feature("Evaluation", "Any task of lm-eval, at any multiplier")
def test_task_runs_on_the_steered_model(model, tokenizer, task):
    scores = sweep_tasks(model, tokenizer, [task], [0.0, 1.0, -1.0], batch_size=3)
    assert scores.labels == ["task"]
    for multiplier, group in scores.table.groupby("multiplier"):
        accuracies = group.sort_values("example")["acc"].tolist()
        assert accuracies == slow_accuracies(model, tokenizer, multiplier)
        results = evaluate_tasks(model, tokenizer, [task], multiplier, limit=5)
        assert results["results"]["own_choices"]["acc,none"] == pytest.approx(sum(accuracies[:5]) / 5)
    accuracy = scores.table.pivot(index="example", columns="multiplier", values="acc")
    assert not accuracy[0.0].equals(accuracy[1.0])


def test_evaluation_restores_mode_and_multiplier(model, tokenizer, task):
    model.train()
    evaluate_tasks(model, tokenizer, [task], 0.5)
    assert model.training
    assert model.base_model.model.model.layers[2].yapo.multiplier["default"] == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": []}, r"tasks=\[\]"),
        ({"multipliers": []}, r"multipliers=\[\]"),
        ({"multipliers": [1.0, 1.0]}, "without duplicates"),
        ({"metric": "f1"}, "'own_choices' has no per-document number 'f1'; it has 'acc'"),
        ({"filter": "strict"}, "filter='strict': must be one of 'none' for task 'own_choices'"),
        ({"tasks": "mmluu"}, r"tasks=\['mmluu'\]: must be tasks"),
        ({"use_cache": "c"}, "use_cache= is not supported"),
        ({"adapter_name": "x"}, "no YaPO adapter 'x'"),
    ],
)
def test_invalid_arguments_raise(model, tokenizer, task, options, message):
    arguments = {"tasks": [task], "multipliers": [1.0]} | options
    with pytest.raises(ConfigError, match=message):
        sweep_tasks(model, tokenizer, **arguments)


def test_completion_positions_are_not_supported(tokenizer, task):
    model = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae(), positions="completion"))
    with pytest.raises(UnsupportedOperationError, match="positions='completion': lm-eval does not mark"):
        evaluate_tasks(model, tokenizer, [task])


def test_eval_command_on_a_saved_adapter(saved_adapter, tokenizer, task, tmp_path, capsys):
    model = AutoPeftModelForCausalLM.from_pretrained(saved_adapter).eval()
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "own.yaml").write_text(json.dumps(task))
    arguments = [
        "eval", str(saved_adapter), "--tasks", "own_choices", "--include-path", str(tmp_path / "tasks"),
        "--multipliers", "0,1", "--out", str(tmp_path / "scores.json"),
    ]  # fmt: skip
    assert main(arguments) == 0
    assert "own_choices" in capsys.readouterr().out
    table = Scores.load(tmp_path / "scores.json").table
    for multiplier, group in table.groupby("multiplier"):
        assert group.sort_values("example")["acc"].tolist() == slow_accuracies(model, tokenizer, multiplier)
