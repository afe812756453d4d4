"""Pairs from two descriptions."""

import pytest
from datasets import Dataset, load_dataset
from tiny import make_attentive_model, make_model

from yapo_peft import ConfigError, DatasetError
from yapo_peft.data import generate_contrast, generate_rejected, with_system_prompt
from yapo_peft.data.contrast import are_alike, is_refusal, packaged_questions, system_prompt

QUESTIONS = [f"w{n} w{n + 1}" for n in range(6)]
MANNERS = tuple(" ".join(f"w{n}" for n in range(start, start + 20)) for start in (50, 80))
OPTIONS = {"max_new_tokens": 6, "batch_size": 2, "shard_size": 4, "do_sample": False}


def said(text, role):
    return [{"role": role, "content": text}]


@pytest.mark.feature("Data", "`generate_contrast`: pairs from two descriptions, which the model itself answers by")
def test_both_answers_are_those_under_their_system_prompt(tmp_path, tokenizer, capsys):
    model = make_attentive_model()
    pairs = generate_contrast(model, tokenizer, *MANNERS, tmp_path / "a", questions=QUESTIONS, **OPTIONS)
    assert f"Created {len(pairs)} pairs from 6 questions; dropped " in capsys.readouterr().out
    assert 0 < len(pairs) <= 6
    prompts = Dataset.from_list(
        [{"prompt": said(text, "user"), "chosen": said("x", "assistant")} for text in QUESTIONS]
    )
    for manner, column in zip(MANNERS, ("chosen", "rejected"), strict=True):
        asked = with_system_prompt(prompts, system_prompt(manner))
        alone = generate_rejected(model, tokenizer, asked, tmp_path / column, **OPTIONS)
        expected = {row["prompt"][1]["content"]: row["rejected"] for row in alone}
        assert all(pair[column] == expected[pair["prompt"][0]["content"]] for pair in pairs)
    assert all(len(pair["prompt"]) == 1 for pair in pairs)
    saved = load_dataset("parquet", data_files=str(tmp_path / "a" / "pairs-*.parquet"), split="train")
    assert saved.to_list() == pairs.to_list()
    with pytest.raises(ConfigError, match=r"has results of another run .*prompts"):
        generate_contrast(model, tokenizer, "w1", "w2", tmp_path / "a", questions=QUESTIONS, **OPTIONS)


def test_templates_without_a_system_role_get_it_in_the_users_message(tmp_path, tokenizer):
    import copy

    other = copy.deepcopy(tokenizer)
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    other.chat_template = refusal + tokenizer.chat_template
    pairs = generate_contrast(make_attentive_model(), other, *MANNERS, tmp_path, questions=QUESTIONS, **OPTIONS)
    prompts = Dataset.from_list(
        [{"prompt": said(text, "user"), "chosen": said("x", "assistant")} for text in QUESTIONS]
    )
    asked = with_system_prompt(prompts, system_prompt(MANNERS[0]), as_user=True)
    alone = generate_rejected(make_attentive_model(), other, asked, tmp_path / "alone", **OPTIONS)
    assert pairs[0]["chosen"] in alone["rejected"]


def test_system_prompts():
    assert system_prompt(" You love power. ") == "You love power."
    assert system_prompt("answers in rhyme.").startswith("You are an assistant who answers in rhyme. Do so")


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I\u2019m sorry, I can\u2019t.", True),
        ("As an AI, I have no opinion.", True),
        ("I cannot answer this.", True),
        ("Sorry to hear that! Here is what helps:", False),
        ("I can help with that.", False),
        ("I'm afraid of nothing more than heights.", False),
        ("I won't lie, it is great.", False),
        ("I am sorry, that is something I cannot do.", True),
        ("A can of beans costs little.", False),
        ("Apologies are hard. Say what you did.", False),
    ],
)
def test_refusals(text, is_one):
    assert is_refusal(text) == is_one


def test_answers_that_are_alike():
    words = [f"w{n}" for n in range(20)]
    assert are_alike(" ".join(words), " ".join(words).upper() + "  w99")
    assert not are_alike(" ".join(words), " ".join(words[:15]))


def test_the_packaged_questions_are_many_and_different():
    questions = packaged_questions()
    assert len({question.casefold() for question in questions}) == len(questions) >= 200
    assert all(question == question.strip() and question.endswith((".", "?")) for question in questions)


def test_bad_arguments_are_named(tmp_path, tokenizer, monkeypatch):
    model = make_model()
    for manners, questions, error, message in (
        (("a", " A "), QUESTIONS, ConfigError, "describe two different manners"),
        (("", "a"), QUESTIONS, ConfigError, "describe two different manners"),
        (MANNERS, "w1", DatasetError, "questions is a text"),
        (MANNERS, [], DatasetError, "it has no prompts"),
    ):
        with pytest.raises(error, match=message):
            generate_contrast(model, tokenizer, *manners, tmp_path, questions=questions, **OPTIONS)
    monkeypatch.setattr("yapo_peft.data.contrast.are_alike", lambda *_: True)
    with pytest.raises(
        DatasetError, match=r"None of 6 questions gave a pair \(0 empty, 0 declining to answer, 6 alike\)"
    ):
        generate_contrast(model, tokenizer, *MANNERS, tmp_path, questions=QUESTIONS, **OPTIONS)


@pytest.mark.feature("Commands", "`yapo data contrast`: pairs from two descriptions")
def test_the_command_reads_questions_from_files(tmp_path, tokenizer):
    from yapo_cli import main

    make_attentive_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "questions.txt").write_text("\n".join(QUESTIONS) + "\n\n")
    Dataset.from_dict({"prompt": QUESTIONS}).to_csv(tmp_path / "questions.csv")
    options = ["--model", tmp_path / "base", "--towards", MANNERS[0], "--away", MANNERS[1], "--max-new-tokens", 6]
    found = []
    for name in ("questions.txt", "questions.csv"):
        out = tmp_path / f"out-{name}"
        more = ["--questions", tmp_path / name, "--limit", 4, "--temperature", 0, "--output-dir", out]
        assert main(["data", "contrast", *map(str, options + more)]) == 0
        found.append(load_dataset("parquet", data_files=str(out / "pairs-*.parquet"), split="train").to_list())
    assert found[0] == found[1]
    assert 0 < len(found[0]) <= 4
