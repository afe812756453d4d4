"""Each command on a saved adapter gives the same results as the library."""

import json
import shutil
from datetime import date

import pandas as pd
import pytest
import torch
from datasets import load_dataset
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import D_MODEL, inference_sae, make_model, make_sae, make_wrapper, random_ids
from transformers import AutoModelForCausalLM, AutoTokenizer

from yapo_cli import loading
from yapo_peft import ConfigError, Scores, YaPOConfig, calibrate, steering, sweep
from yapo_peft.export import constant_steering
from yapo_peft.interpret import attribute, compare, compare_features, contexts, explain
from yapo_peft.methods import fit_caa, measure_contrast, prune
from yapo_peft.sae import loader
from yapo_peft.scoring.generation import answer
from yapo_peft.scoring.pairs import prompt_ids
from yapo_peft.tuner.adapters import steered_layers

SHORT = ("--max-new-tokens", 4, "--json")


def codes(model_or_folder, adapter_name="default"):
    model = model_or_folder
    if not isinstance(model, torch.nn.Module):
        model = AutoPeftModelForCausalLM.from_pretrained(model)
    return [layer.code(adapter_name).detach() for layer in steered_layers(model)]


def as_messages(text):
    return [{"role": "user", "content": text}]


@pytest.mark.feature("Commands", "`yapo generate`: a batch of prompts at several multipliers, or a conversation")
def test_generate_matches_the_library(run, saved_adapter, tokenizer, tmp_path):
    (tmp_path / "more.txt").write_text("w9\n\nw7 w8\n")
    options = ("--max-new-tokens", 6, "--multipliers", "-2,0,1.5", "--batch-size", 4, "--json")
    status, printed, _ = run("generate", saved_adapter, "w1 w2 w3", "--file", tmp_path / "more.txt", *options)
    assert status == 0
    rows = json.loads(printed)
    model = AutoPeftModelForCausalLM.from_pretrained(saved_adapter).eval()
    assert [row["prompt"] for row in rows[::3]] == ["w1 w2 w3", "w9", "w7 w8"]
    for row in rows:
        ids = prompt_ids(as_messages(row["prompt"]), tokenizer)
        with steering(model, row["multiplier"]):
            ((text, finished),) = answer(model, tokenizer, [ids], max_new_tokens=6, do_sample=False)
        assert (row["answer"], row["finished"]) == (text, finished)
    assert len({row["answer"] for row in rows[:3]}) > 1
    status, printed, _ = run("generate", saved_adapter, "w1 w2 w3", *options[:-1])
    assert f"  -2  {rows[0]['answer']}\n  +0  {rows[1]['answer']}\n" in printed


def test_generate_takes_a_system_prompt_with_and_without_the_template(run, saved_adapter):
    def answers(*arguments):
        return json.loads(run("generate", saved_adapter, *arguments, *SHORT, "--json")[1])

    system, joined = answers("w1 w2", "--system", "w8", "--plain"), answers("w8\n\nw1 w2", "--plain")
    assert [row["answer"] for row in system] == [row["answer"] for row in joined]
    assert {row["prompt"] for row in system} == {"w1 w2"}


@pytest.mark.feature("Commands", "`--model`: where the adapter's model is, if it has moved")
def test_the_model_of_an_adapter_can_have_moved(run, saved_adapter, tmp_path):
    options = ("generate", "w1 w2", "--multipliers", "1", *SHORT)
    _, expected, _ = run(options[0], saved_adapter, *options[1:])
    folder = shutil.copytree(saved_adapter, tmp_path / "copy")
    config = json.loads((folder / "adapter_config.json").read_text())
    moved = config["base_model_name_or_path"]
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path / "no")}))
    for command, *rest in (options, ("explain", "--json"), ("prune", "--features", 3, "--out", tmp_path / "pruned")):
        status, _, said = run(command, folder, *rest)
        assert status == 2
        assert "--model" in said
        assert run(command, folder, *rest, "--model", moved)[0] == 0
    assert run(options[0], folder, *options[1:], "--model", moved)[1] == expected


@pytest.mark.feature("Commands", "Adapters of vision-language models, on text")
def test_commands_load_a_vision_wrapper(run, tokenizer, pairs_file, tmp_path):
    make_wrapper().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = type(make_wrapper()).from_pretrained(tmp_path / "base").eval()
    model = get_peft_model(base, YaPOConfig(layers=2, space="dense", init_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    status, printed, _ = run("sweep", tmp_path / "adapter", "--dataset", pairs_file, "--json")
    assert status == 0
    rows = load_dataset("json", data_files=str(pairs_file), split="train")
    multipliers = (-2.0, -1.0, 0.0, 1.0, 2.0)
    expected = sweep(model, rows, tokenizer, multipliers).summary()["margin"]
    assert [row["margin"] for row in json.loads(printed)] == pytest.approx(list(expected), abs=1e-4)
    assert run("generate", tmp_path / "adapter", "w1", *SHORT)[0] == 0
    fitted = ("fit", "caa", "--model", tmp_path / "base", "--layers", 2, "--dataset", pairs_file)
    assert run(*fitted, "--out", tmp_path / "caa")[0] == 0


def test_json_output_is_not_mixed_with_library_output(run, saved_adapter, monkeypatch):
    """Some libraries, such as DeepSpeed, print to standard output when they are imported."""
    from_pretrained = PeftModel.from_pretrained

    def noisy(*arguments, **options):
        print("output of a library")
        return from_pretrained(*arguments, **options)

    monkeypatch.setattr(PeftModel, "from_pretrained", noisy)
    status, printed, stderr = run("generate", saved_adapter, "w1", "--max-new-tokens", 2, "--json")
    assert status == 0
    assert len(json.loads(printed)) == 3
    assert "output of a library" in stderr


def test_sampling_is_reproducible_with_a_seed(run, saved_adapter):
    options = ("generate", saved_adapter, "w1", "--max-new-tokens", 8, "--temperature", 5, "--json", "--seed")
    once, again, other = (run(*options, seed)[1] for seed in (1, 1, 2))
    assert once == again != other


def test_plain_prompts_skip_the_chat_template(run, saved_adapter, tokenizer):
    _, printed, _ = run("generate", saved_adapter, "w1 w2", "--plain", "--multipliers", 0, *SHORT)
    model = AutoPeftModelForCausalLM.from_pretrained(saved_adapter).eval()
    with steering(model, 0.0):
        ((text, _),) = answer(model, tokenizer, [prompt_ids("w1 w2", tokenizer)], max_new_tokens=4, do_sample=False)
    assert json.loads(printed)[0]["answer"] == text


def test_chat_keeps_its_history_and_changes_its_multiplier(run, saved_adapter, tokenizer, monkeypatch):
    lines = iter(["w1 w2", "/multiplier 2", "w3", "/multiplier x", "/help", "/reset", "w1 w2", "/quit", "never read"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    status, printed, _ = run("generate", saved_adapter, "--chat", "--multipliers", "-1", "--max-new-tokens", 4)
    assert status == 0
    model = AutoPeftModelForCausalLM.from_pretrained(saved_adapter).eval()
    expected, messages = [], []
    for multiplier, message in ((-1, "w1 w2"), (2, "w3"), (2, None)):
        messages = as_messages("w1 w2") if message is None else [*messages, *as_messages(message)]
        with steering(model, float(multiplier)):
            ids = prompt_ids(messages, tokenizer)
            ((text, _),) = answer(model, tokenizer, [ids], max_new_tokens=4, do_sample=False)
        messages = [*messages, {"role": "assistant", "content": text}]
        expected.append(f"[{multiplier:+d}] {text}")
    replies = [line.strip() for line in printed.splitlines() if line.startswith("[")]
    assert replies == [line.strip() for line in expected]
    assert "must be comma-separated numbers" in printed
    assert "/reset" in printed


@pytest.mark.feature("Commands", "`yapo sweep`: preference, choice or damage over multipliers")
@pytest.mark.parametrize("measure", ["preference", "choice", "damage"])
def test_sweep_saves_scores_and_a_plot(run, saved_adapter, pairs_file, tmp_path, measure):
    questions = [{"question": "w1 w2", "options": ["w3", "w4"], "answer": 1}] * 3
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    (tmp_path / "text.txt").write_text("w1 w2 w3 w4 w5 w6 " * 100)
    files = {"preference": pairs_file, "choice": tmp_path / "questions.json", "damage": tmp_path / "text.txt"}
    options = ("--measure", measure, "--multipliers", "-1,0,1", "--limit", 2, "--json")
    outputs = ("--out", tmp_path / "scores.json", "--plot", tmp_path / "doses.png")
    status, printed, stderr = run("sweep", saved_adapter, "--dataset", files[measure], *options, *outputs)
    assert status == 0, stderr
    rows = json.loads(printed)
    assert [row["multiplier"] for row in rows] == [-1, 0, 1]
    assert {row["examples"] for row in rows} == {2}
    scores = Scores.load(tmp_path / "scores.json")
    assert rows == json.loads(scores.summary().to_json(orient="records"))
    assert (tmp_path / "doses.png").stat().st_size > 1000


def test_sweep_matches_the_library(run, saved_adapter, tokenizer, pairs, pairs_file):
    _, printed, _ = run("sweep", saved_adapter, "--dataset", pairs_file, "--multipliers", "2,0", "--json")
    model = AutoPeftModelForCausalLM.from_pretrained(saved_adapter).eval()
    expected = sweep(model, pairs, tokenizer, (2.0, 0.0)).summary()
    assert pd.DataFrame(json.loads(printed))["margin"].tolist() == pytest.approx(expected["margin"].tolist(), rel=1e-5)


@pytest.mark.feature("Commands", "`yapo sweep` of several adapters, or of a run's checkpoints, on one loaded model")
def test_sweep_of_checkpoints_and_adapters_matches_the_library(
    run, saved_adapter, tokenizer, pairs, pairs_file, tmp_path, monkeypatch
):
    mine = tmp_path / "mine"
    for step, features in ((9, 4), (50, 8), (100, 12)):
        assert run("prune", saved_adapter, "--features", features, "--out", mine / f"checkpoint-{step}")[0] == 0
    (mine / "checkpoint-200").mkdir()  # incomplete
    loaded, load_base = [], loading._load_base
    monkeypatch.setattr(loading, "_load_base", lambda *given: loaded.append(given) or load_base(*given))
    options = ("--dataset", pairs_file, "--multipliers", "-2,0,2", "--limit", 6, "--json")
    outputs = ("--out", tmp_path / "scores.json", "--plot", tmp_path / "doses.svg")
    status, printed, stderr = run("sweep", mine, saved_adapter, *options, *outputs)
    assert status == 0, stderr
    assert len(loaded) == 1
    table = pd.DataFrame(json.loads(printed))
    places = [mine / f"checkpoint-{step}" for step in (9, 50, 100)] + [saved_adapter]
    names = ["mine/checkpoint-9", "mine/checkpoint-50", "mine/checkpoint-100", "adapter"]
    assert table["adapter"].unique().tolist() == names
    for name, place in zip(names, places, strict=True):
        model = AutoPeftModelForCausalLM.from_pretrained(place).eval()
        expected = sweep(model, pairs.select(range(6)), tokenizer, (-2, 0, 2)).summary()
        found = table[table["adapter"] == name].drop(columns="adapter").reset_index(drop=True)
        pd.testing.assert_frame_equal(found, expected, check_dtype=False)
    scores = Scores.load(tmp_path / "scores.json")
    assert scores.labels == ["adapter"]
    assert json.loads(scores.summary().to_json(orient="records")) == json.loads(printed)
    text = (tmp_path / "doses.svg").read_text()
    assert "preference on pairs.jsonl" in text
    assert f"base, {date.today().isoformat()} (6 examples)" in text
    assert all(f"<!-- {name} -->" in text for name in names)


def test_a_sweep_keeps_what_was_measured_before_a_failure(run, saved_adapter, pairs_file, tmp_path, monkeypatch):
    other = shutil.copytree(saved_adapter, tmp_path / "other")
    attached = loading._attached

    def fail_at_other(model, name):
        if name == str(other):
            raise ConfigError("out of luck")
        return attached(model, name)

    monkeypatch.setattr(loading, "_attached", fail_at_other)
    options = ("--dataset", pairs_file, "--multipliers", "0", "--out", tmp_path / "scores.json")
    assert run("sweep", saved_adapter, other, *options)[0] == 2
    assert set(Scores.load(tmp_path / "scores.json").table["adapter"]) == {"adapter"}


@pytest.mark.feature("Commands", "`yapo explain`: the features of an adapter as a table or JSON")
def test_explain_matches_the_library(run, saved_adapter, tokenizer, pairs, pairs_file):
    options = ("--top", 3, "--multiplier", -2, "--dataset", pairs_file, "--json")
    status, printed, _ = run("explain", saved_adapter, *options)
    assert status == 0
    model = AutoPeftModelForCausalLM.from_pretrained(saved_adapter).eval()
    table = explain(model, tokenizer=tokenizer, top=3, multiplier=-2.0, texts=pairs.to_list(), labels=False)
    assert [row["feature"] for row in json.loads(printed)] == table["feature"].tolist()
    assert [row["promotes"] for row in json.loads(printed)] == table["promotes"].tolist()
    status, printed, _ = run("explain", saved_adapter, "--top", 1, "--tokens", 2)
    assert len(printed.splitlines()) == 2
    assert "label" not in printed


@pytest.mark.feature("Commands", "`yapo attribute`: what each feature contributes, as a table or JSON")
def test_attribute_matches_the_library(run, saved_adapter, tokenizer, pairs, pairs_file, monkeypatch):
    options = ("--dataset", pairs_file, "--limit", 3, "--top", 4, "--steps", 2, "--multiplier", -2)
    status, printed, stderr = run("attribute", saved_adapter, *options, "--json")
    assert status == 0, stderr
    model = AutoPeftModelForCausalLM.from_pretrained(saved_adapter).eval()
    expected = attribute(model, pairs.select(range(3)), tokenizer, top=4, steps=2, multiplier=-2.0, batch_size=8)
    found = json.loads(printed)
    assert found["pairs"] == 3
    for name in ("effect", "rest", "interaction", "integration_error"):
        assert found[name] == pytest.approx(getattr(expected, name), abs=1e-5)
    rows = pd.DataFrame(found["features"])
    pd.testing.assert_frame_equal(rows, expected.features.head(4), check_dtype=False, atol=1e-5)
    monkeypatch.setattr("yapo_cli.attribute._LARGE_ERROR", abs(expected.integration_error / expected.effect) * 1.01)
    _, printed, _ = run("attribute", saved_adapter, *options)
    assert len(printed.splitlines()) == 7
    monkeypatch.setattr("yapo_cli.attribute._LARGE_ERROR", abs(expected.integration_error / expected.effect) * 0.99)
    assert "raise --steps" in run("attribute", saved_adapter, *options)[1].splitlines()[-1]
    assert f"effect {expected.effect:.4g}, rest {expected.rest:.4g}, interaction" in printed


def test_attribute_takes_a_prompt_with_two_answers(run, saved_adapter, tokenizer):
    options = ("--system", "w7", "--top", 2, "--steps", 1, "--json")
    status, printed, stderr = run("attribute", saved_adapter, "w1 w2", "w3", "w4 w5", *options)
    assert status == 0, stderr
    prompt = [{"role": "system", "content": "w7"}, *as_messages("w1 w2")]
    answers = {
        name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "w3"), ("rejected", "w4 w5"))
    }
    model = AutoPeftModelForCausalLM.from_pretrained(saved_adapter).eval()
    expected = attribute(model, [{"prompt": prompt, **answers}], tokenizer, top=2, steps=1)
    assert json.loads(printed)["effect"] == pytest.approx(expected.effect, abs=1e-5)


@pytest.mark.feature(
    "Commands", "`yapo compare-features`: the features that adapters share, and those that they do not"
)
def test_compare_features_matches_the_library(run, saved_adapter, tmp_path):
    few = tmp_path / "few.v1"  # PEFT does not take dots in names
    assert run("prune", saved_adapter, "--features", 5, "--rescale", "--out", few)[0] == 0
    status, printed, stderr = run("compare-features", saved_adapter, few, "--top", 9, "--json")
    assert status == 0, stderr
    found = json.loads(printed)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), saved_adapter)
    model.load_adapter(few, "few")
    expected = compare_features(model, top=9).rename(columns={"default": "adapter", "few": "few.v1"})
    assert expected["few.v1"].count() == 5
    pd.testing.assert_frame_equal(pd.DataFrame(found["features"]), expected)
    (row,) = found["adapters"]
    (overlap,) = compare(model).to_dict("records")
    assert (row["a"], row["b"]) == ("adapter", "few.v1")
    for name in ("features_a", "features_b", "shared", "overlap", "same_sign", "code_cosine", "up_cosine"):
        assert row[name] == pytest.approx(overlap[name])
    _, printed, _ = run("compare-features", saved_adapter, few, "--top", 2)
    assert len(printed.splitlines()) == 6
    inference_sae(make_sae(), tmp_path / "sae")
    raised = ("--feature", "2:7=1", "--sae-path", tmp_path / "sae")
    assert run("steer", tmp_path / "base", *raised, "--out", tmp_path / "raised")[0] == 0
    _, printed, _ = run("compare-features", saved_adapter, tmp_path / "raised", "--top", 2)
    assert "down_cosine" not in printed.splitlines()[0]
    assert "Not defined for these adapters: same_sign, down_cosine." in printed


def test_compare_features_names_different_saes_before_loading(run, saved_adapter, tmp_path, monkeypatch):
    model = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae(seed=5), self_contained=True))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "other")
    monkeypatch.setattr(loading, "_load_base", lambda *_: pytest.fail("a model is loaded"))
    status, _, stderr = run("compare-features", saved_adapter, tmp_path / "other")
    assert status == 2
    assert "have different SAEs at layer 2" in stderr


@pytest.mark.feature("Commands", "`yapo fit`, `yapo prune`, `yapo combine`: adapters from pairs or adapters")
def test_fit_prune_and_combine_match_the_library(
    run, saved_adapter, tokenizer, pairs, pairs_file, tmp_path, monkeypatch
):
    base = tmp_path / "base"
    status, printed, _ = run(
        "fit", "caa", "--model", base, "--layers", "1,2", "--dataset", pairs_file, "--out", tmp_path / "caa"
    )
    assert status == 0
    assert str(tmp_path / "caa") in printed
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "caa").eval()
    saved = codes(model)
    fit_caa(model, measure_contrast(model, pairs, tokenizer))
    for vector, expected in zip(saved, codes(model), strict=True):
        assert len(vector) == D_MODEL
        torch.testing.assert_close(vector, expected)

    inference_sae(make_sae(), tmp_path / "sae")
    options = ("--layers", 2, "--sae-path", tmp_path / "sae", "--dataset", pairs_file, "--tau", 0.9)
    assert run("fit", "sas", "--model", base, *options, "--out", tmp_path / "sas")[0] == 0
    assert codes(tmp_path / "sas")[0].any()

    assert run("prune", saved_adapter, "--features", 5, "--rescale", "--out", tmp_path / "few")[0] == 0
    model = AutoPeftModelForCausalLM.from_pretrained(saved_adapter)
    unpruned = codes(model)[0].clone()
    prune(model, 5, rescale=True)
    assert torch.equal(codes(tmp_path / "few")[0], codes(model)[0])

    weights = ("--weights", "1,-0.5", "--out", tmp_path / "both")
    status, _, stderr = run("combine", saved_adapter, tmp_path / "few", *weights)
    assert status == 0, stderr
    torch.testing.assert_close(codes(tmp_path / "both")[0], unpruned - 0.5 * codes(tmp_path / "few")[0])
    assert sorted(file.name for file in (tmp_path / "both").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip

    for known in ("_by_source", "_registered"):
        monkeypatch.setattr(loader, known, {})
    again = ("combine", saved_adapter, tmp_path / "few", *weights[:2], "--out", tmp_path / "again")
    status, _, stderr = run(*again)
    assert (status, "with --sae-path" in stderr) == (2, True)
    status, _, stderr = run(*again, "--sae-path", tmp_path / "sae")
    assert status == 0, stderr
    assert torch.equal(codes(tmp_path / "again")[0], codes(tmp_path / "both")[0])


@torch.no_grad()
@pytest.mark.parametrize("mode", ["add", "clamp"])
def test_a_self_contained_copy_needs_no_sae(run, saved_adapter, tmp_path, mode):
    from yapo_cli.push import _with_saes

    inference_sae(make_sae(), tmp_path / "sae")
    options = ("--sae-path", tmp_path / "sae", "--mode", mode, "--out", tmp_path / "made")
    assert run("steer", tmp_path / "base", "--feature", "2:7=3.5", "--feature", "2:1=0.5", *options)[0] == 0
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "made").eval()
    (tmp_path / "copy").mkdir()
    copy = _with_saes(tmp_path / "made", tmp_path / "copy")
    assert "register_sae" in (tmp_path / "made" / "README.md").read_text()
    assert "register_sae" not in (copy / "README.md").read_text()
    (tmp_path / "sae").rename(tmp_path / "gone")
    loaded = AutoPeftModelForCausalLM.from_pretrained(copy).eval()
    for multiplier in (1.0, -1.0):
        with steering(model, multiplier), steering(loaded, multiplier):
            torch.testing.assert_close(loaded(random_ids()).logits, model(random_ids()).logits)


@pytest.mark.feature("Commands", "`yapo steer`: adapters of chosen features, and edits of adapters")
def test_steer_makes_and_edits_adapters(run, saved_adapter, tmp_path):
    inference_sae(make_sae(), tmp_path / "sae")
    options = ("--sae-path", tmp_path / "sae", "--positions", "completion")
    made, edited = tmp_path / "made", tmp_path / "edited"
    status, _, stderr = run(
        "steer", tmp_path / "base", "--feature", "2:7=3.5", "--feature=2:1=-1", *options, "--out", made
    )
    assert status == 0, stderr
    assert run("steer", made, "--feature", "2:7=0", "--feature", "2:9=1", "--out", edited)[0] == 0
    expected = {made: {7: 3.5, 1: -1.0}, edited: {1: -1.0, 9: 1.0}}
    for folder, entries in expected.items():
        model = AutoPeftModelForCausalLM.from_pretrained(folder)
        (code,) = codes(model)
        assert {int(index): float(code[index]) for index in code.nonzero()} == entries
        assert model.peft_config["default"].positions == "completion"
    held = ("--mode", "clamp", "--feature", "2:7=0", "--feature", "2:1=4", *options, "--out", tmp_path / "held")
    assert run("steer", tmp_path / "base", *held)[0] == 0
    assert run("steer", tmp_path / "held", "--feature", "2:7=none", "--out", tmp_path / "less")[0] == 0
    for name, features in {"held": [1, 7], "less": [1]}.items():
        (code,) = codes(AutoPeftModelForCausalLM.from_pretrained(tmp_path / name))
        assert code.nonzero().flatten().tolist() == features
    for folder, rows in {
        made: ["| 2 | 7 | +3.5 | constant |", "| 2 | 1 | -1 | input-dependent |"],
        tmp_path / "held": ["| 2 | 7 | 0 | turned off |", "| 2 | 1 | 4 | held |"],
    }.items():
        card = (folder / "README.md").read_text()
        assert all(row in card for row in rows)
        assert str(tmp_path) not in card
        assert ("holds features at their values" in card) == (folder != made)
    for wrong, message in (
        (("--feature", "2:7=1", "--mode", "clamp"), "has its own"),
        (("--feature", "7=3"), "must be LAYER:FEATURE=VALUE"),
        (("--feature", "2:7=1", "--feature", "2:7=2"), "given twice"),
        (("--feature", "2:7=1", "--positions", "last"), "has its own"),
        (("--feature", "2:1=0", "--feature", "2:9=0"), "no feature is left that the adapter steers. A value of 0"),
        (("--feature", "2:1=none", "--feature", "2:9=none"), "no feature is left that the adapter steers."),
        (("--feature", "2:7=none"), "2:7=none: the adapter does not steer this feature"),
    ):
        status, _, stderr = run("steer", edited, *wrong, "--out", tmp_path / "wrong")
        assert status == 2
        assert message in " ".join(stderr.replace("│", "").split())
    assert not (tmp_path / "wrong").exists()


@pytest.mark.feature("Commands", "`yapo calibrate`: multiplier 1 is a stated damage")
def test_calibrate_matches_the_library(run, saved_adapter, tokenizer, tmp_path):
    text, out = tmp_path / "neutral.txt", tmp_path / "calibrated"
    text.write_text("w1 w2 w3 w4\n\nw5 w6 w7")
    status, printed, stderr = run("calibrate", saved_adapter, "--max-kl", 0.001, "--text", text, "--out", out)
    assert status == 0, stderr
    model = AutoPeftModelForCausalLM.from_pretrained(saved_adapter)
    damage = calibrate(model, tokenizer, 0.001, dataset=["w1 w2 w3 w4", "w5 w6 w7"])
    torch.testing.assert_close(codes(out)[0], codes(model)[0])
    assert f"KL {damage['plus']:.3g} nats per token at multiplier +1, {damage['minus']:.3g} at -1." in printed
    assert json.loads((out / "adapter_config.json").read_text())["damage"] == pytest.approx(damage)
    assert run("calibrate", saved_adapter, "--max-kl", 0, "--out", tmp_path / "x")[0] == 2


@pytest.mark.feature("Commands", "`yapo contexts`: the passages where features are most active")
def test_contexts_matches_the_library(run, saved_adapter, tokenizer, pairs, pairs_file, tmp_path):
    model = AutoPeftModelForCausalLM.from_pretrained(saved_adapter)
    options = ("--dataset", pairs_file, "--passages", 2, "--window", 1)
    status, printed, stderr = run("contexts", saved_adapter, *options, "--feature", "2:3", "--feature", "2:5", "--json")
    assert status == 0, stderr
    table = contexts(model, {2: [3, 5]}, pairs.to_list(), tokenizer, top=2, window=1)
    assert json.loads(printed) == json.loads(table.to_json(orient="records"))
    status, printed, _ = run("contexts", saved_adapter, *options, "--top", 2)
    assert status == 0
    strongest = explain(model, tokenizer=tokenizer, top=2, labels=False)["feature"].tolist()
    table = contexts(model, strongest, pairs.to_list(), tokenizer, top=2, window=1)
    for row in table.to_dict("records"):
        place = min(row["position"], 1)
        assert f"[[{row['tokens'][place]}]]".replace(" ", "") in printed.replace(" ", "")
    assert printed.count("Layer 2, feature ") == table["feature"].nunique()
    (tmp_path / "text.txt").write_text("w1 w2 w3\n \nw4 w5 w6\n\n")  # as in WikiText
    status, printed, _ = run("contexts", saved_adapter, "--text", tmp_path / "text.txt", "--json")
    assert status == 0
    assert {row["text"] for row in json.loads(printed)} == {0, 1}
    for wrong, message in (
        ((), "pass --text, or else --dataset"),
        ((*options, "--feature", "x"), "--feature x: must be LAYER:FEATURE"),
        ((*options, "--feature", "1:3"), "the adapter steers layers [2]"),
    ):
        status, _, stderr = run("contexts", saved_adapter, *wrong)
        assert status == 2
        assert message in stderr


@pytest.mark.feature("Commands", "`yapo convert`: adapters of TopK SAEs, self-contained for both signs")
def test_convert_makes_an_adapter_of_a_topk_sae_self_contained(run, saved_adapter, sae_folder, tmp_path):
    text, made, out = tmp_path / "text.txt", tmp_path / "made", tmp_path / "converted"
    text.write_text("\n\n".join(f"w{n} w{n + 1} w{n + 2} w{n + 3}" for n in range(8)))
    features = ("--feature", "2:7=3.5", "--feature=2:1=-1", "--sae-path", sae_folder("topk"))
    base = json.loads((saved_adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert run("steer", base, *features, "--out", made)[0] == 0
    status, printed, stderr = run("convert", made, "--text", text, "--out", out)
    assert status == 0, stderr
    config = json.loads((out / "adapter_config.json").read_text())
    assert f"{100 * config['conversion']['differ']:.1f} % of the code's active features are not active" in printed
    assert config["self_contained"]
    status, _, stderr = run("convert", saved_adapter, "--text", text, "--out", tmp_path / "x")
    assert status == 2
    assert "has no TopK SAE with a non-zero code" in stderr


@pytest.mark.feature("Commands", "`yapo export`: files for other programs, and how exact they are")
def test_export_reports_whether_it_is_exact(run, saved_adapter, tmp_path):
    (tmp_path / "text.txt").write_text("w1 w2 w3 w4\n\nw5 w6 w7 w8")
    options = ("--format", "safetensors", "--multiplier", 0.5, "--text", tmp_path / "text.txt", "--json")
    status, printed, stderr = run("export", saved_adapter, tmp_path / "v.safetensors", *options, "--max-kl", 100)
    assert status == 0, stderr
    verdict = json.loads(printed)
    assert not verdict["exact"]
    model = AutoPeftModelForCausalLM.from_pretrained(saved_adapter).eval()
    texts = ["w1 w2 w3 w4", "w5 w6 w7 w8"]
    expected = constant_steering(model, 0.5, texts, AutoTokenizer.from_pretrained(tmp_path / "base"))
    assert verdict["kl"] == pytest.approx(expected.kl)
    assert torch.equal(load_file(tmp_path / "v.safetensors")["block.2"], expected.vectors[2])
    status, _, stderr = run("export", saved_adapter, tmp_path / "w.safetensors", *options, "--max-kl", 1e-9)
    assert status == 2
    assert "above --max-kl 1e-09" in stderr
    status, printed, _ = run("export", saved_adapter, tmp_path / "vec", "--format", "vec")
    assert "Exact at multiplier 1, with the same SAE." in printed


@pytest.mark.feature("Commands", "`yapo data reject`: on-policy rejected answers, on one process or several")
def test_data_reject_saves_pairs(run, saved_adapter, pairs, tmp_path):
    rows = [{"q": row["prompt"][0]["content"], "a": row["chosen"][0]["content"]} for row in pairs]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--prompt", "q", "--chosen", "a", "--max-new-tokens", 4, "--temperature", 0)
    status, printed, stderr = run(
        "data", "reject", "--model", tmp_path / "base", "--dataset", tmp_path / "rows.jsonl", *options,
        "--output-dir", tmp_path / "out",
    )  # fmt: skip
    assert status == 0, stderr
    files = [str(file) for file in (tmp_path / "out").glob("pairs-*.parquet")]
    saved = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert f"Saved {len(saved)} pairs to" in printed
    assert set(saved.column_names) >= {"prompt", "chosen", "rejected"}
