import json

import pytest
from datasets import Dataset, DatasetDict

from yapo_peft import ConfigError, DatasetError
from yapo_peft.data import load_pairs, load_rows, where, with_system_prompt

CSV = "question,matching,not_matching\nw1?,w2,w3\nw4?,w5,w6\n"
BIPO = {"prompt": "question", "chosen": "matching", "rejected": "not_matching"}
PAIRS = [
    {
        "prompt": [{"role": "user", "content": f"w{i}?"}],
        "chosen": [{"role": "assistant", "content": f"w{i + 1}"}],
        "rejected": [{"role": "assistant", "content": f"w{i + 2}"}],
    }
    for i in (1, 4)
]


def said(text, role="assistant"):
    return [{"role": role, "content": text}]


@pytest.fixture
def source(tmp_path):
    """Writes the same rows in one of the supported formats."""

    def write(kind):
        rows = Dataset.from_list(
            [{"question": f"w{i}?", "matching": f"w{i + 1}", "not_matching": f"w{i + 2}"} for i in (1, 4)]
        )
        path = tmp_path / f"pairs.{kind}"
        if kind == "csv":
            path.write_text(CSV)
        elif kind == "tsv":
            path.write_text(CSV.replace(",", "\t"))
        elif kind == "jsonl":
            rows.to_json(str(path))
        elif kind == "parquet":
            rows.to_parquet(str(path))
        elif kind == "saved":
            rows.save_to_disk(str(path))
        elif kind == "saved dict":
            DatasetDict(train=rows).save_to_disk(str(path))
        else:
            return rows
        return path

    return write


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet", "saved", "saved dict", "dataset"])
def test_load_pairs_reads_all_formats(source, kind):
    assert load_pairs(source(kind), **BIPO).to_list() == PAIRS


def test_load_pairs_keeps_texts_without_chat(source):
    pairs = load_pairs(source("csv"), **BIPO, chat=False)
    assert pairs[0] == {"prompt": "w1?", "chosen": "w2", "rejected": "w3"}


def test_load_pairs_keeps_messages_and_named_columns():
    rows = Dataset.from_list([{**PAIRS[0], "country": "UK", "other": 1}])
    assert load_pairs(rows, keep=["country"]).to_list() == [{**PAIRS[0], "country": "UK"}]


def test_load_pairs_extracts_shared_prompt():
    prompt, chosen, rejected = (PAIRS[0][name] for name in ("prompt", "chosen", "rejected"))
    rows = Dataset.from_list([{"good": prompt + chosen, "bad": prompt + rejected}])
    assert load_pairs(rows, prompt=None, chosen="good", rejected="bad").to_list() == PAIRS[:1]


def test_load_pairs_without_rejected_column(source):
    for options in ({"prompt": "question", "chosen": "matching"}, {}):
        pairs = load_pairs(source("csv"), **options, rejected=None)
        assert pairs.column_names == ["prompt", "chosen"]
        assert pairs["chosen"] == [pair["chosen"] for pair in PAIRS]


CULTURE = {"prompt-mcq": "w1?", "chosen-mcq": "w2", "rejected_gemma_2_2b_it_mcq": "w3", "country": "UK"}


@pytest.mark.feature("Data", "Columns of TRL, UltraFeedback, BiPO and Deep-Culture-Lense, without naming them")
@pytest.mark.parametrize(
    "row",
    [
        {"question": "w1?", "matching": "w2", "not_matching": "w3"},
        CULTURE,
        {"prompt": "w1?", "chosen": PAIRS[0]["prompt"] + said("w2"), "rejected": PAIRS[0]["prompt"] + said("w3")},
        {"chosen": PAIRS[0]["prompt"] + said("w2"), "rejected": PAIRS[0]["prompt"] + said("w3")},
    ],
    ids=["BiPO", "Deep-Culture-Lense", "UltraFeedback", "implicit prompt"],
)
def test_known_columns_need_no_names(row):
    assert load_pairs(Dataset.from_list([row])).to_list() == PAIRS[:1]


def test_several_columns_of_rejected_answers_are_named():
    rows = Dataset.from_list([CULTURE | {"rejected_llama_mcq": "w4"}])
    with pytest.raises(DatasetError, match=r"2 columns of rejected answers: .*'rejected_gemma_2_2b_it_mcq'"):
        load_pairs(rows)
    assert load_pairs(rows, prompt="prompt-mcq", chosen="chosen-mcq", rejected="rejected_llama_mcq")[0]["rejected"] == (
        said("w4")
    )


def test_a_prompt_can_be_put_together_from_columns():
    rows = Dataset.from_list([{"prompt-mcq": "w1", "n": 7, "chosen": "w2", "rejected": "w3", "prompt": "w9"}])
    assert load_pairs(rows, prompt="{prompt-mcq} in {n}")[0]["prompt"] == said("w1 in 7", "user")
    missing = Dataset.from_list(
        [{"a": None, "chosen": "w2", "rejected": "w3"}, {"a": "w1", "chosen": "w2", "rejected": "w3"}]
    )
    with pytest.warns(UserWarning, match="1 of 2 pairs are left out"):
        assert load_pairs(missing, prompt="{a}?")["prompt"] == [said("w1?", "user")]
    with pytest.raises(DatasetError, match=r"no column 'm': .*columns 'prompt-mcq'"):
        load_pairs(rows, prompt="{m}?")
    with pytest.raises(DatasetError, match=r"prompt='\{n:d\}' is not a template .*: formats are not supported"):
        load_pairs(rows, prompt="{n:d}")
    with pytest.raises(DatasetError, match=r"prompt='\{n' is not a template such as '\{context\} \{question\}'"):
        load_pairs(rows, prompt="{n")


def test_columns_that_are_not_named_are_found_beside_those_that_are():
    rows = [{"prompt-mcq": "q", "chosen-mcq": "a", "rejected_x_mcq": "b", "rejected_y_mcq": "c", "question": "d"}]
    pairs = load_pairs(Dataset.from_list(rows), rejected="rejected_y_mcq", chat=False)
    assert pairs.to_list() == [{"prompt": "q", "chosen": "a", "rejected": "c"}]
    rows = [{"question": "q", "matching": "a", "not_matching": "b", "chosen": "c", "other": "d"}]
    own = load_pairs(Dataset.from_list(rows), chosen="chosen", rejected="other", chat=False)
    assert own.to_list() == [{"prompt": "q", "chosen": "c", "rejected": "d"}]
    assert load_pairs(Dataset.from_list(rows), chat=False)["chosen"][:] == ["a"]
    swapped = load_pairs(Dataset.from_list(rows), chosen="not_matching", rejected="matching", chat=False)
    assert swapped.to_list() == [{"prompt": "q", "chosen": "b", "rejected": "a"}]


def test_cells_of_a_csv_file_are_read_as_they_are_written(tmp_path):
    file = tmp_path / "pairs.csv"
    cells = ["007", "1.50", "true", "1e3", "123456789012345678901234567890", "2024-01-31", "NA", "+5"]
    file.write_text("\ufeffprompt,chosen,rejected\n" + "".join(f"{cell},{cell},x\n" for cell in cells))
    pairs = load_pairs(file, chat=False)
    assert pairs["prompt"][:] == pairs["chosen"][:] == cells
    file.write_text("prompt;chosen;rejected\n1;2;3\n")
    assert load_pairs(file, chat=False, sep=";").to_list() == [{"prompt": "1", "chosen": "2", "rejected": "3"}]
    file.write_text("prompt,chosen,rejected,x\n1,2,3,4\n5,6,7,8\n")
    assert load_rows(file, nrows=1).to_list() == [{"prompt": "1", "chosen": "2", "rejected": "3", "x": "4"}]
    assert load_rows(file, usecols=["prompt", "x"]).column_names == ["prompt", "x"]
    file.write_text("prompt,chosen,rejected,chosen\n1,2,3,4\n")
    with pytest.raises(DatasetError, match="several columns 'chosen': rename all but one"):
        load_pairs(file)


@pytest.mark.parametrize("is_list", [False, True])
def test_texts_of_a_json_file_that_look_like_dates_stay_texts(tmp_path, is_list):
    day = "2024-01-31"
    rows = [{"prompt": said(day, "user"), "chosen": day, "rejected": "2024-02-01"}] * 2
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps(rows) if is_list else "\n".join(map(json.dumps, rows)))
    assert load_pairs(file)["prompt"][:] == [said(day, "user")] * 2
    assert load_pairs(file)["chosen"][:] == [said(day)] * 2


def test_a_number_that_lost_digits_is_named():
    rows = Dataset.from_list([{"prompt": "w1", "chosen": 1e19, "rejected": 2.0}])
    with pytest.raises(DatasetError, match=r"Row 0 has chosen=1e\+19"):
        load_pairs(rows)


def test_numbers_of_a_csv_file_are_texts_and_longer_rows_are_named(tmp_path):
    file = tmp_path / "pairs.CSV"
    file.write_text("year,prompt,chosen,rejected\n2020,3,4,5\n,6,7,8.5\n")
    first, second = load_pairs(file, prompt="{year}: {prompt}", chat=False).to_list()
    assert first == {"prompt": "2020: 3", "chosen": "4", "rejected": "5"}
    assert second == {"prompt": ": 6", "chosen": "7", "rejected": "8.5"}
    for rows in ("A,b,c,d\nE,f,g,h\n", "A,b,c\nE,f,g,h\n"):
        file.write_text("prompt,chosen,rejected\n" + rows)
        with pytest.raises(DatasetError, match=r"pairs\.CSV"):
            load_pairs(file)
    file.write_text("prompt,chosen,rejected\nA,b,c,d\n")
    with pytest.raises(DatasetError, match="rows with more fields than its header"):
        load_pairs(file)


def test_templates_are_for_texts():
    rows = [{"a": [{"role": "user", "content": "hi"}], "chosen": "a", "rejected": "b"}]
    with pytest.raises(DatasetError, match=r"Row 0 has a=.* a template needs texts or numbers"):
        load_pairs(Dataset.from_list(rows), prompt="{a}")


def test_missing_answers_of_implicit_prompts_are_counted():
    rows = [("Q: a", "Q: b"), ("", "Q: b"), ("Q: x", None)]
    dataset = Dataset.from_list([{"chosen": chosen, "rejected": rejected} for chosen, rejected in rows])
    with pytest.warns(UserWarning, match="2 of 3 pairs are left out: 2 without a prompt or an answer"):
        pairs = load_pairs(dataset, chat=False)
    assert len(pairs) == 1


def test_empty_and_equal_pairs_are_left_out_with_warning():
    rows = [("", "w2", "w3"), ("w1", "w2", None), ("w1", "w2 ", "w2"), ("w1", "w2", "w3"), ("w1", " ", "w3")]
    dataset = Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows])
    message = (
        r"4 of 5 pairs are left out: 3 without a prompt or an answer \(first in row 0\); 1 with equal answers .*row 2"
    )
    with pytest.warns(UserWarning, match=message):
        assert len(load_pairs(dataset)) == 1
    with pytest.raises(DatasetError, match="No preference pair is left of 2 rows: 2 without"):
        load_pairs(dataset.select([0, 1]))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"prompt": "qestion"},
            DatasetError,
            r"no column 'qestion' \(did you mean 'question'\?\)",
        ),
        ({**BIPO, "keep": ["country"]}, DatasetError, "no column 'country'"),
        ({**BIPO, "keep": "country"}, ConfigError, r"keep='country': must be a list"),
        ({**BIPO, "split": "test"}, DatasetError, "is a file, which has one split"),
        ({**BIPO, "keep": ["prompt"]}, ConfigError, "The column 'prompt' would be overwritten"),
        ({**BIPO, "streaming": True}, DatasetError, "streaming=True"),
        ({"prompt": None, "rejected": None}, ConfigError, "prompt=None needs two answers"),
    ],
)
def test_load_pairs_rejects_wrong_column_mapping(source, options, error, message):
    with pytest.raises(error, match=message):
        load_pairs(source("csv"), **options)


@pytest.mark.parametrize(
    ("row", "chat", "message"),
    [
        ({"prompt": {"text": "w1"}}, True, "Row 0 has prompt={.*}: must be a text, or a list of messages"),
        ({"prompt": [{"from": "human"}]}, True, "Row 0 has prompt=.*'role' and 'content'"),
        ({"prompt": said("w1", "user")}, False, "Row 0 has messages in 'prompt'"),
    ],
)
def test_load_pairs_names_invalid_cell(row, chat, message):
    rows = Dataset.from_list([{"chosen": "w1", "rejected": "w2", **row}])
    with pytest.raises(DatasetError, match=message):
        load_pairs(rows, chat=chat)


@pytest.mark.parametrize(
    ("source_", "error", "message"),
    [
        ("nowhere.csv", FileNotFoundError, "The file 'nowhere.csv' does not exist"),
        (["a"], DatasetError, "source is a list"),
        (DatasetDict(), DatasetError, "source is a DatasetDict"),
    ],
)
def test_load_rows_names_invalid_source(source_, error, message):
    with pytest.raises(error, match=message):
        load_rows(source_)


def test_load_rows_names_unsupported_format(tmp_path):
    (tmp_path / "pairs.xlsx").touch()
    with pytest.raises(DatasetError, match=r"pairs.xlsx' has an unsupported format: must be one of .csv"):
        load_rows(tmp_path / "pairs.xlsx")


def test_load_rows_lists_splits_of_saved_dataset(source):
    with pytest.raises(DatasetError, match="no split 'test': use one of 'train'"):
        load_rows(source("saved dict"), "test")


COUNTRIES = Dataset.from_list(
    [{"country": c, "status": s, "i": i} for i, (c, s) in enumerate([("UK", "l"), ("UK", "n"), ("Iran", "l")])]
)


def test_where_selects_rows_by_values():
    assert where(COUNTRIES, country="UK", status="l")["i"] == [0]
    assert where(COUNTRIES, country=["UK", "Iran"], status="l")["i"] == [0, 2]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"country": ["UK", "Mars"]}, "No row has country='Mars': use one of 'UK', 'Iran'"),
        ({"country": "Mars"}, "No row has country='Mars': use one of 'UK', 'Iran'"),
        ({"planet": "Mars"}, "no column 'planet': name one of its columns 'country', 'status', 'i'"),
        ({"country": "Iran", "status": "n"}, "No row has country='Iran', status='n' at the same time"),
    ],
)
def test_where_rejects_values_without_rows(values, message):
    with pytest.raises(DatasetError, match=message):
        where(COUNTRIES, **values)


def test_with_system_prompt_precedes_each_prompt():
    pairs = with_system_prompt(Dataset.from_list(PAIRS), "w9")
    assert pairs[0]["prompt"] == [*said("w9", "system"), *PAIRS[0]["prompt"]]
    assert pairs[0]["chosen"] == PAIRS[0]["chosen"]
    texts = with_system_prompt(Dataset.from_list([{"prompt": "w1"}]), "w9")
    assert texts[0]["prompt"] == "w9\n\nw1"
    with pytest.raises(DatasetError, match="has a system message already: 'w9'"):
        with_system_prompt(pairs, "w8")


def test_load_pairs_cuts_conversations_to_answers():
    def said(role, text):
        return {"role": role, "content": text}

    answers = [said("assistant", "w3")], [said("assistant", "w4")]
    rows = [{"prompt": "w1 w2", "chosen": [said("user", "w1 w2 "), *answers[0]], "rejected": answers[1]}]
    pair = load_pairs(Dataset.from_list(rows))[0]
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == ([said("user", "w1 w2")], *answers)
    rows[0]["chosen"][0]["content"] = "w9"
    with pytest.raises(DatasetError, match="Row 0 has a chosen conversation that does not start with its prompt"):
        load_pairs(Dataset.from_list(rows))
