import pytest
import torch
from _reference.yapo import completion_logp, steer_block
from peft import get_peft_model
from tiny import make_model, make_sae, preference_rows, random_code, set_code

from yapo_peft import ConfigError, DatasetError, YaPOConfig, plot_dose_response, score_preferences, sweep_preferences
from yapo_peft.evaluation.preference import PreferenceScore


def steered():
    model = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae()))
    set_code(model, random_code())
    return model


def slow_margins(rows, tokenizer, multiplier):
    """One answer at a time, on an unwrapped model."""
    model, margins = make_model(), []
    if multiplier:
        steer_block(model.model.layers[2], random_code(), make_sae(), multiplier)
    for row in rows:
        logps = []
        for answer in ("chosen", "rejected"):
            if isinstance(row["prompt"], str):
                prompt, whole = tokenizer(row["prompt"]), tokenizer(row["prompt"] + " " + row[answer] + " <eos>")
                prompt, whole = prompt["input_ids"], whole["input_ids"]
            else:
                chat = row["prompt"] + row[answer]
                rendered = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
                prompt = tokenizer(rendered)["input_ids"]
                whole = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False))["input_ids"]
            assert whole[: len(prompt)] == prompt
            ids = torch.tensor([whole])
            mask = torch.tensor([[0] * len(prompt) + [1] * (len(whole) - len(prompt))])
            with torch.no_grad():
                logps.append(completion_logp(model(ids).logits, ids, mask))
        margins.append(float(logps[0] - logps[1]))
    return torch.tensor(margins)


@pytest.mark.parametrize("conversational", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_scores_equal_those_of_one_answer_at_a_time(tokenizer, conversational, batch_size):
    rows = preference_rows(7, conversational)
    if not conversational:
        rows = [row | {k: f" {row[k]} " for k in ("chosen", "rejected")} for row in rows]
    scores = sweep_preferences(steered(), rows, tokenizer, (-2.0, 0.0, 1.0), batch_size=batch_size)
    assert [score.multiplier for score in scores] == [-2.0, 0.0, 1.0]
    for score in scores:
        expected = slow_margins(rows, tokenizer, score.multiplier)
        assert score.margin == pytest.approx(float(expected.mean()), rel=1e-3, abs=1e-3)
        assert score.accuracy == pytest.approx(float((expected > 0).float().mean()))
        assert score.pairs == 7


def test_adapters_of_other_positions_score_as_they_were_trained(tokenizer):
    rows = preference_rows(5)
    everywhere = score_preferences(steered(), rows, tokenizer, 1.0)
    model = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae(), positions="completion"))
    set_code(model, random_code())
    on_answers = score_preferences(model, rows, tokenizer, 1.0)
    with model.disable_adapter():
        nowhere = score_preferences(model, rows, tokenizer, 1.0)
    assert len({round(score.margin, 3) for score in (everywhere, on_answers, nowhere)}) == 3


def test_scoring_changes_neither_mode_nor_strength(tokenizer):
    model = steered().train()
    before = model.base_model.model.model.layers[2].yapo.multiplier["default"]
    score_preferences(model, preference_rows(2), tokenizer, -1.0)
    assert model.training
    assert model.base_model.model.model.layers[2].yapo.multiplier["default"] == before


@pytest.mark.parametrize(
    ("rows", "options", "error", "message"),
    [
        ([], {}, DatasetError, "The dataset is empty"),
        ([{"prompt": "w1", "chosen": "w2"}], {}, DatasetError, r"A pair lacks \['rejected'\]"),
        ([{"prompt": "", "chosen": "w2", "rejected": "w3"}], {}, DatasetError, r"A pair lacks \['prompt'\]"),
        (preference_rows(1), {"multipliers": []}, ConfigError, r"multipliers=\[\]"),
        (preference_rows(1), {"batch_size": 0}, ConfigError, "batch_size=0"),
        (preference_rows(1), {"multipliers": [float("nan")]}, ConfigError, "multiplier=nan"),
        (preference_rows(1), {"adapter_name": "x"}, ConfigError, "no YaPO adapter 'x'"),
    ],
)
def test_bad_input_is_named(tokenizer, rows, options, error, message):
    with pytest.raises(error, match=message):
        sweep_preferences(steered(), rows, tokenizer, **options)


def test_the_picture_is_drawn(tmp_path):
    scores = [PreferenceScore(m, 0.5 + 0.2 * m, 10 * m, 60) for m in (1.0, -1.0, 0.0)]
    path = plot_dose_response(scores, tmp_path / "new" / "dose.png", "Dose-response")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in path.parent.iterdir()] == ["dose.png"]


def test_a_picture_needs_an_ending(tmp_path):
    with pytest.raises(ConfigError, match="has no ending, which chooses the format"):
        plot_dose_response([PreferenceScore(m, 0.5, 0.0, 3) for m in (0.0, 1.0)], tmp_path / "dose", "x")


def test_one_strength_is_no_dose_response(tmp_path):
    with pytest.raises(ConfigError, match="at least two strengths, got 1"):
        plot_dose_response([PreferenceScore(1.0, 0.5, 0.0, 3)], tmp_path / "dose.png", "x")
