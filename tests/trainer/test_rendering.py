"""One rendering of a row: training, sweeps, fits, readings and rejected answers see the same tokens."""

from copy import deepcopy

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from yapo_peft import DatasetError
from yapo_peft.data import load_pairs, with_system_prompt
from yapo_peft.interpret.texts import tokens_of
from yapo_peft.scoring.pairs import pair_batches, prompt_ids, rendering


def message(role, text, **fields):
    return [{"role": role, "content": text, **fields}]


CHAT = {
    "prompt": message("user", "w1"),
    "chosen": message("assistant", "w5 w6"),
    "rejected": message("assistant", "w7"),
}
TOOLS = [{"type": "function", "function": {"name": "w99", "description": "", "parameters": {}}}]
ROWS = {
    "texts": {"prompt": "w1 ", "chosen": "w5 w6", "rejected": "w7"},
    "texts that end": {"prompt": "w1 ", "chosen": "w5 <eos>", "rejected": "w7 <eos>"},
    "messages": CHAT,
    "system": {**CHAT, "prompt": message("system", "w9") + CHAT["prompt"]},
    "tools": {**CHAT, "tools": TOOLS},
    "tools as JSON": {**CHAT, "tools": '[{"type": "function", "function": {"name": "w98"}}]'},
    "options of the template": {**CHAT, "chat_template_kwargs": {"mood": "w97"}},
}


@pytest.fixture
def templated(tokenizer) -> PreTrainedTokenizerFast:
    tools = "{% for tool in tools or [] %}{{ tool['function']['name'] + ' ' }}{% endfor %}"
    own = deepcopy(tokenizer)
    own.chat_template = tools + "{{ (mood or '') + ' ' }}" + tokenizer.chat_template
    return own


@pytest.mark.feature("Data", "Columns `tools` and `chat_template_kwargs`, in training and everywhere else")
@pytest.mark.parametrize("name", ROWS)
def test_a_row_has_the_same_tokens_everywhere(build, templated, name):
    row = ROWS[name]
    trained = build(train_dataset=Dataset.from_list([row]), init={"processing_class": templated}).train_dataset[0]
    (batch,) = pair_batches([row], templated, 1)
    for index, answer in enumerate(("chosen", "rejected")):
        expected = trained["prompt_ids"] + trained[f"{answer}_ids"]
        read = batch["input_ids"][index][batch["attention_mask"][index].bool()].tolist()
        assert read == expected
        assert int(batch["answer_mask"][index].sum()) == len(trained[f"{answer}_ids"])
    prompt = prompt_ids(row["prompt"], templated, **rendering(row))
    assert prompt[: len(trained["prompt_ids"])] == trained["prompt_ids"]
    if not isinstance(row["prompt"], str):
        assert tokens_of(row, templated) == trained["prompt_ids"] + trained["chosen_ids"]
    expected = {"tools": "w99", "tools as JSON": "w98", "options of the template": "w97"}.get(name)
    assert expected is None or expected in templated.decode(prompt)


@pytest.mark.parametrize("read", [lambda row, t: pair_batches([row], t, 1), lambda row, t: tokens_of(row, t)])
def test_images_are_not_ignored(tokenizer, read):
    with pytest.raises(DatasetError, match="A row has 'images', and only text is read here"):
        read({**CHAT, "images": [object()]}, tokenizer)


@pytest.mark.parametrize("empty", ["", [], message("assistant", ""), message("assistant", None)], ids=repr)
def test_empty_answers_are_refused_in_training_and_elsewhere(build, tokenizer, empty):
    texts = {"prompt": "w1 ", "chosen": "w2", "rejected": "w3"}
    row = {**(texts if isinstance(empty, str) else CHAT), "rejected": empty}
    with pytest.raises(DatasetError, match="rejected"):
        pair_batches([row], tokenizer, 1)
    with pytest.raises(DatasetError, match="rejected"):
        build(train_dataset=Dataset.from_list([row]))


CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "w8"}}}]


@pytest.mark.feature("Data", "System prompts where the chat template has no system role", refused="with what to do")
@pytest.mark.parametrize("read", [lambda row, t: pair_batches([row], t, 1), lambda row, t: tokens_of(row, t)])
def test_a_template_without_a_system_role_is_named(tokenizer, read):
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + tokenizer.chat_template
    )
    rows = Dataset.from_list([{"prompt": message("user", "w1"), "chosen": message("assistant", "w2")}])
    rows = rows.map(lambda row: {"rejected": message("assistant", "w3")})
    with pytest.raises(DatasetError, match=r"System role not supported.*with_system_prompt\(\.\.\., as_user=True\)"):
        read(with_system_prompt(rows, "w9")[0], tokenizer)
    read(with_system_prompt(rows, "w9", as_user=True)[0], tokenizer)


def parts(role, text):
    return message(role, [{"type": "text", "text": text}])


def load(**columns):
    return load_pairs(Dataset.from_list([{**CHAT, **columns}]))[0]


def test_messages_keep_all_of_their_fields():
    asked = [*message("user", "w1"), *message("assistant", "", tool_calls=CALL), *message("tool", "w7", name="weather")]
    prompt = load(prompt=asked)["prompt"]
    assert prompt[1]["tool_calls"][0]["function"] == CALL[0]["function"]
    assert prompt[2]["name"] == "weather"
    chosen = load(chosen=message("assistant", None, tool_calls=CALL))["chosen"]
    assert chosen[0]["tool_calls"][0]["function"]["name"] == "weather"
    # A conversation is cut to its answer, the calls before it included.
    whole = [*asked, *message("assistant", "w5", tool_calls=None)]
    assert [said["content"] for said in load(prompt=asked, chosen=whole)["chosen"]] == ["w5"]


def test_columns_that_trl_reads_are_kept():
    row = load(tools=TOOLS, chat_template_kwargs={"mood": "w9"}, other=1)
    assert row.keys() == {"prompt", "chosen", "rejected", "tools", "chat_template_kwargs"}


@pytest.mark.parametrize("as_user", [False, True])
def test_content_of_parts_stays_parts(as_user):
    row = {name: parts(said[0]["role"], said[0]["content"]) for name, said in CHAT.items()}
    pairs = load_pairs(Dataset.from_list([row]))
    assert pairs[0] == row
    prompt = with_system_prompt(pairs, "Be kind.", as_user=as_user)[0]["prompt"]
    assert prompt[0]["content"][0]["text"] == "Be kind."
    assert [part["text"] for part in prompt[-1]["content"]][-1] == "w1"
    assert len(prompt) == (1 if as_user else 2)


def test_empty_parts_are_no_answer():
    with pytest.raises(DatasetError, match="1 without a prompt or an answer"):
        load(rejected=parts("assistant", " "), prompt=parts("user", "w1"), chosen=parts("assistant", "w2"))
