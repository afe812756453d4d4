import pytest
from datasets import Dataset

from yapo_peft import ConfigError, DatasetError
from yapo_peft.data import choice_pairs, choice_prompt, load_choices

ROW = {"q": "w1 ?", "o": ["w2", "w3", "w4"], "a": 1, "country": "UK"}
COLUMNS = {"question": "q", "options": "o", "answer": "a"}


@pytest.mark.parametrize("answer", [1, "B", " b", "w3"])
def test_load_choices_accepts_index_letter_or_text_as_answer(answer):
    questions = load_choices(Dataset.from_list([{**ROW, "a": answer}]), **COLUMNS, keep=["country"])
    assert questions.to_list() == [
        {"question": "w1 ?", "options": ["w2", "w3", "w4"], "answer": 1, "country": "UK"},
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"o": ["O", "A", "B"], "a": "A"}, "the text of option B but the letter of another one"),
        ({"a": 3}, "Row 0 has a=3, which is not one of its 3 options"),
        ({"a": "w9"}, "Row 0 has a='w9'"),
        ({"a": -1}, "Row 0 has a=-1"),
        ({"o": ["w2"]}, "must be a list of at least two non-empty strings"),
        ({"o": ["w2", "w2"]}, "has duplicate options"),
        ({"q": " "}, "Row 0 has q=' '"),
    ],
)
def test_load_choices_names_invalid_row(change, message):
    with pytest.raises(DatasetError, match=message):
        load_choices(Dataset.from_list([{**ROW, **change}]), **COLUMNS)


def test_missing_column_error_lists_columns():
    with pytest.raises(
        DatasetError, match="no column 'question', 'options', 'answer': name one of its columns 'q', 'o', 'a',"
    ):
        load_choices(Dataset.from_list([ROW]))


@pytest.mark.parametrize("form", ["text", "letter"])
def test_choice_pairs_reject_each_wrong_option(form):
    pairs = choice_pairs(load_choices(Dataset.from_list([ROW]), **COLUMNS), form=form, wrong="each")
    answers = ["w2", "w3", "w4"] if form == "text" else ["A", "B", "C"]
    assert [pair["chosen"][0]["content"] for pair in pairs] == [answers[1]] * 2
    assert [pair["rejected"][0]["content"] for pair in pairs] == [answers[0], answers[2]]
    prompt = pairs[0]["prompt"][0]["content"]
    assert prompt == choice_prompt("w1 ?", ["w2", "w3", "w4"], form)
    assert ("B. w3" in prompt) == (form == "letter")


def test_random_wrong_options_are_reproducible():
    questions = load_choices(Dataset.from_list([ROW] * 20), **COLUMNS)
    rejected = [[pair["rejected"] for pair in choice_pairs(questions, seed=seed)] for seed in (0, 0, 1)]
    assert rejected[0] == rejected[1] != rejected[2]
    assert len(choice_pairs(questions)) == 20


@pytest.mark.parametrize(
    ("options", "message"), [({"form": "number"}, "form='number'"), ({"wrong": "all"}, "wrong='all'")]
)
def test_choice_pairs_rejects_unknown_argument(options, message):
    with pytest.raises(ConfigError, match=message):
        choice_pairs(load_choices(Dataset.from_list([ROW]), **COLUMNS), **options)


def test_choice_pairs_reads_answers_of_every_kind():
    rows = Dataset.from_list([{"question": "w1", "options": ["w2", "w3"], "answer": "B"}])
    assert choice_pairs(rows, chat=False).to_list() == [{"prompt": "w1", "chosen": "w3", "rejected": "w2"}]


def test_choice_prompt_rejects_more_than_26_options():
    with pytest.raises(ConfigError, match="27 options"):
        choice_prompt("w1", [f"w{i}" for i in range(27)])
