"""The options that say which pairs to read, in every command."""

import inspect
import json

import pytest
from datasets import Dataset

from yapo_cli import answers, attribute, compare, culture, data, explain, fit, report, sweep
from yapo_cli.pairs import PairArguments
from yapo_peft import ConfigError, DatasetError
from yapo_peft.scripts.arguments import make_parser, parse

COMMANDS = {
    "fit caa": (fit.caa, set()),
    "fit sas": (fit.sas, set()),
    "sweep": (sweep.sweep, set()),
    "report": (report.report, set()),
    "compare": (compare.compare, set()),
    "explain": (explain.explain, set()),
    "attribute": (attribute.attribute, set()),
    "answers": (answers.answers, {"chosen", "rejected", "options", "answer"}),
    "culture": (culture.culture, {"chosen", "rejected", "system", "plain"}),
    "data reject": (data.reject, {"rejected", "options", "answer"}),
}
NAMES = set(PairArguments.__dataclass_fields__)


@pytest.mark.feature("Commands", "The same options for pairs wherever pairs are read")
@pytest.mark.parametrize("name", COMMANDS)
def test_commands_have_the_same_options(name):
    command, left_out = COMMANDS[name]
    options = inspect.signature(command).parameters
    assert options.keys() & NAMES == NAMES - left_out
    assert "data" not in options


def test_train_has_them_too_and_reads_a_repeated_one():
    assert {action.dest for action in make_parser()._actions} >= NAMES | {"eval_split"}
    given = ["--output_dir", "x", "--where", "a=1", "--plain", "--where=b=2", "--where", "c=3", "d=4", "--prompt", "p"]
    (*_, pairs, _), _, _ = parse(given)
    assert (pairs.where, pairs.plain, pairs.prompt) == (["a=1", "b=2", "c=3", "d=4"], True, "p")
    # Where a list is expected, the first option goes on.
    assert given[2] == "--where"


SAID = {"prompt": "w1?", "chosen": "w2", "rejected": "w3"}
MESSAGES = {
    name: [{"role": "user" if name == "prompt" else "assistant", "content": text}] for name, text in SAID.items()
}
FILES = {
    "BiPO.csv": ([{"question": "w1?", "matching": "w2", "not_matching": "w3"}], {}),
    "named.csv": ([{"q": "w1?", "good": "w2", "bad": "w3"}], {"prompt": "q", "chosen": "good", "rejected": "bad"}),
    "messages.jsonl": ([MESSAGES], {}),
    "implicit.jsonl": ([{name: MESSAGES["prompt"] + MESSAGES[name] for name in ("chosen", "rejected")}], {}),
    "template.parquet": ([SAID | {"a": "w1", "b": 1}], {"prompt": "{a}?"}),
    "choices.jsonl": ([{"question": "w1?", "options": ["w3", "w2"], "answer": "B"}], {}),
    "named choices.jsonl": ([{"q": "w1?", "o": ["w2", "w3"], "a": 0}], {"prompt": "q", "options": "o", "answer": "a"}),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("plain", [False, True], ids=["chat", "plain"])
def test_pairs_of_every_form_are_the_same(tmp_path, tokenizer, name, plain):
    rows, options = FILES[name]
    file = tmp_path / name
    dataset = Dataset.from_list(rows)
    {".csv": dataset.to_csv, ".jsonl": dataset.to_json, ".parquet": dataset.to_parquet}[file.suffix](str(file))
    arguments = PairArguments(str(file), plain=plain, **options)
    if plain and name in ("messages.jsonl", "implicit.jsonl"):
        with pytest.raises(Exception, match="has messages in 'prompt', but chat=False"):
            arguments.load(tokenizer)
    else:
        assert arguments.load(tokenizer).to_list() == [SAID if plain else MESSAGES]


def test_a_model_without_a_chat_template_gets_texts(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps(SAID))
    assert PairArguments(str(tmp_path / "pairs.jsonl")).load(object()).to_list() == [SAID]


def test_rows_are_selected_by_values_of_any_type(tmp_path, tokenizer):
    rows = [SAID | {"country": country, "year": year} for country in ("UK", "Iran", "Peru") for year in (1, 2, 3)]
    Dataset.from_list(rows).to_json(tmp_path / "pairs.jsonl")

    def load(*conditions, **options):
        return PairArguments(str(tmp_path / "pairs.jsonl"), where=list(conditions), **options).load(tokenizer)

    assert len(load("country=UK", "year=2", "year=3")) == 2
    assert len(load("country=UK", limit=1)) == 1
    assert load("country=UK", "year=1", system="w7")[0]["prompt"][0] == {"role": "system", "content": "w7"}
    with pytest.raises(ConfigError, match=r"--where 'country': must be column=value, such as country=UK"):
        load("country")
    with pytest.raises(Exception, match=r"No row has country='France': use one of 'UK', 'Iran', 'Peru'"):
        load("country=France")


UNREAD = {
    "split": ({"split": "test"}, "split='test': .* is a file, which has one split"),
    "answers": ({"options": "o", "chosen": "x"}, "--chosen x: options and answers are those of multiple-choice"),
    "options": ({"options": "o"}, "no column 'o', 'answer'"),
    "system": ({"system": 5}, "system=5: must be a text"),
    "where": ({"where": {"country": "UK"}}, "where=.* must be texts of the form column=value"),
    "limit": ({"limit": 2.5}, "limit=2.5: must be a whole number"),
    "list": ({"where": ["tags=x"]}, "The column 'tags' has lists or mappings"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_options_without_effect_and_values_of_other_types_are_named(tmp_path, tokenizer, name):
    options, message = UNREAD[name]
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({**SAID, "tags": ["x"]}))
    with pytest.raises((ConfigError, DatasetError), match=message.format(file=file)):
        PairArguments(str(file), **options).load(tokenizer)


def test_columns_of_options_beside_known_pairs_are_not_read(tmp_path, tokenizer):
    row = {"question": "w1?", "matching": "w2", "not_matching": "w3", "options": ["w4", "w5"], "answer": 0}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    pairs = PairArguments(str(tmp_path / "pairs.jsonl"), plain=True).load(tokenizer)
    assert pairs.to_list() == [SAID]


def test_sweep_names_options_that_a_measure_does_not_read(run, saved_adapter, tmp_path):
    (tmp_path / "text.txt").write_text("w1")
    for option, value in (("--where", "a=b"), ("--system", "w1"), ("--prompt", "p")):
        command = ["sweep", saved_adapter, "--dataset", tmp_path / "text.txt", "--measure", "damage", option, value]
        status, _, error = run(*command)
        assert status == 2
        assert f"{option} " in error
        assert "--measure damage does not read it" in error
