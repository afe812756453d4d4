import json

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from yapo_peft import ConfigError, DatasetError, steering, sweep
from yapo_peft.data import choice_prompt
from yapo_peft.evaluation import Damage, GeneratedChoice, MultipleChoice, Repetition
from yapo_peft.evaluation.choice import named_option
from yapo_peft.evaluation.damage import repeated_share
from yapo_peft.scoring.pairs import prompt_ids

QUESTIONS = [
    {"question": "w1 w2", "options": ["w3", "w4 w5", "w6 w7 w8"], "answer": 1},
    {"question": "w9", "options": ["w10", "w11"], "answer": 0},
    {"question": "w3 w4 w5 w6", "options": ["w1", "w2", "w3", "w4"], "answer": 3},
    {"question": "w8", "options": ["w21 w22", "w23 w24"], "answer": 1},
]
TEXTS = [" ".join(f"w{(7 * i + j) % 90}" for j in range(40)) for i in range(6)]


@torch.no_grad()
def slow_log_probs(model, ids, multiplier):
    """Next-token log-probabilities of one sequence, `(tokens - 1, vocabulary)`."""
    with steering(model, multiplier):
        return model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)


def slow_choice(model, tokenizer, row, multiplier, form, normalise):
    """Margin of the right option, with each option scored in its own forward pass."""
    answers = ["A", "B", "C", "D"][: len(row["options"])] if form == "letter" else row["options"]
    prompt = [{"role": "user", "content": choice_prompt(row["question"], row["options"], form)}]
    before, found = prompt_ids(prompt, tokenizer), []
    for answer in answers:
        own = tokenizer(answer)["input_ids"]
        log_probs = slow_log_probs(model, before + own, multiplier)[len(before) - 1 :]
        total = sum(float(log_probs[i, token]) for i, token in enumerate(own))
        found.append(total / {"none": 1, "tokens": len(own), "characters": len(answer)}[normalise])
    right = found.pop(row["answer"])
    return right - max(found)


@pytest.fixture
def lettered(tokenizer):
    """The tiny tokenizer, with four words replaced by the letters of four options."""
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = core["model"]["vocab"]
    for word, letter in zip(("w101", "w102", "w103", "w104"), "ABCD", strict=True):
        vocabulary[letter] = vocabulary.pop(word)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(core)), pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    fast.chat_template = tokenizer.chat_template
    return fast


@pytest.mark.parametrize("form", ["text", "letter"])
@pytest.mark.parametrize("normalise", ["none", "tokens", "characters"])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_batched_options_match_scoring_each_option_alone(model, lettered, form, normalise, batch_size):
    measure = MultipleChoice(form=form, normalise=normalise)
    scores = sweep(model, QUESTIONS, lettered, (-1.0, 1.5), measure=measure, batch_size=batch_size).table
    for row in scores.itertuples():
        expected = slow_choice(model, lettered, QUESTIONS[row.example], row.multiplier, form, normalise)
        assert row.margin == pytest.approx(expected, abs=1e-4)
        assert row.accuracy == float(expected > 0)
    assert len(scores) == 2 * len(QUESTIONS)


def test_one_token_options_share_one_row(lettered):
    rows = [len(b["input_ids"]) for b in MultipleChoice().batches(QUESTIONS, lettered, 8)]
    assert rows == [4]
    rows = [len(b["input_ids"]) for b in MultipleChoice(form="text").batches(QUESTIONS, lettered, 8)]
    # All options of two of the questions are single tokens, so each of these questions is one row.
    assert sorted(rows) == [2, 5]


def test_question_is_not_a_chat_when_chat_is_false(model, lettered):
    measure = MultipleChoice(form="text", chat=False)
    (batch,) = measure.batches(QUESTIONS[1:2], lettered, 8)
    assert lettered.decode(batch["input_ids"][0][batch["answer_mask"][0] == 0]) == "w9 <unk>"


@pytest.mark.parametrize(
    ("answer", "option"),
    [
        ("B", 1), ("b", 1), ("B.", 1), ("(B) Lyon", 1), ("The answer is C.", 2), ("The correct answer is: (C)", 2),
        ("Answer: A", 0), ("I think the answer is B, because", 1), ("Paris, of course", 0), ("York", 3),
        ("New York City", 2), ("A good question", None),
        
        ("Option A is wrong because it is. The answer is C.", 2), ("The answer is A good question", None),
        ("It is Paris or Lyon", None), ("", None), ("Bern", None),
        ("D", 3), ("E", None), ("a city", None), ("so \\boxed{B}", 1), ("it is $\\boxed{2}$, not A", 1),
        ("\\boxed{\\text{York}}", 3), ("\\boxed{9}", None), ("B is correct. Paris is not.", 1),
        ("A is right and B is correct", None), ("I think C is the right one", 2),
    ],
)  # fmt: skip
def test_named_option_is_parsed_from_the_answer(answer, option):
    assert named_option(answer, ["Paris", "Lyon", "New York City", "York"]) == option


def test_generated_choice_scores_answers():
    rows = [{"question": "q", "options": ["Paris", "Lyon"], "answer": 1}] * 3
    measure = GeneratedChoice()
    assert measure.prompts(rows)[0][0]["content"] == choice_prompt("q", ["Paris", "Lyon"])
    found = measure.score_answers(rows, [0, 1, 2], ["B", "A.", "who knows"])
    assert found == [{"accuracy": a, "answered": b} for a, b in ((1.0, 1.0), (0.0, 1.0), (0.0, 0.0))]


@pytest.mark.parametrize(
    ("make", "rows", "error", "message"),
    [
        (lambda: MultipleChoice(form="number"), QUESTIONS, ConfigError, "form='number'"),
        (lambda: MultipleChoice(normalise="bytes"), QUESTIONS, ConfigError, "normalise='bytes'"),
        (MultipleChoice, [], DatasetError, "The dataset is empty"),
        (MultipleChoice, [{"question": "w1"}], DatasetError, r"lacks the columns \['options', 'answer'\]"),
        (MultipleChoice, [{**QUESTIONS[0], "answer": "B"}], DatasetError, "answer='B' is not an index of 3 options"),
        (GeneratedChoice, [{**QUESTIONS[0], "answer": 3}], DatasetError, "answer=3 is not an index of 3 options"),
        (lambda: Damage(block_size=1), TEXTS, ConfigError, "block_size=1"),
        (lambda: Damage(max_blocks=0), TEXTS, ConfigError, "max_blocks=0"),
        (Damage, ["w1"], DatasetError, "shorter than block_size=256"),
        (Damage, "w1 w2", DatasetError, "is a string"),
        (Damage, [{"words": "w1"}], DatasetError, "column 'text'"),
        (Repetition, [{"question": "w1"}], DatasetError, r"needs a column 'prompt'.*\['question'\]"),
    ],
)
def test_invalid_arguments_raise(model, tokenizer, make, rows, error, message):
    with pytest.raises(error, match=message):
        sweep(model, rows, tokenizer, (0.0, 1.0), measure=make(), batch_size=2)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_batched_damage_matches_measuring_each_text_block_alone(model, tokenizer, batch_size):
    scores = sweep(
        model, TEXTS, tokenizer, (1.0, 0.0), measure=Damage(block_size=50, max_blocks=3), batch_size=batch_size
    )
    ids = tokenizer("\n".join(TEXTS))["input_ids"]
    assert len(scores.table) == 6
    for row in scores.table.itertuples():
        block = ids[50 * row.example : 50 * row.example + 50]
        base, own = (slow_log_probs(model, block, multiplier) for multiplier in (0.0, row.multiplier))
        assert row.kl == pytest.approx(float((base.exp() * (base - own)).sum(-1).mean()), abs=1e-5)
        assert row.nll == pytest.approx(-float(own[range(49), block[1:]].mean()), abs=1e-4)
        assert row.top_changed == pytest.approx(float((base.argmax(-1) != own.argmax(-1)).float().mean()))
    unsteered = scores.table[scores.table["multiplier"] == 0]
    assert unsteered["kl"].abs().max() < 1e-6
    assert scores.table["kl"].max() > 1e-3


@pytest.mark.parametrize(
    ("text", "share"), [("a b c a b c", 1 / 4), ("A b c d", 0.0), ("a a a a a", 2 / 3), ("a b", 0.0), ("", 0.0)]
)
def test_repeated_share(text, share):
    assert repeated_share(text, 3) == pytest.approx(share)


class Length:
    """Measures the number of words of an answer, and a checksum of its text."""

    def prompts(self, dataset):
        return dataset["prompt"]

    def score_answers(self, dataset, examples, answers):
        return [{"checksum": float(sum(answer.encode())), "words": float(len(answer.split()))} for answer in answers]


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_batched_answers_match_generating_each_alone(model, tokenizer, batch_size):
    prompts = Dataset.from_list([{"prompt": f"w{i} w{i + 1}" + " w5" * i} for i in range(4)])
    multipliers = (-1.0, 0.0, 1.0)
    table = sweep(
        model, prompts, tokenizer, multipliers, measure=Length(), batch_size=batch_size, max_new_tokens=5
    ).table
    assert table["multiplier"].tolist() == [-1.0] * 4 + [0.0] * 4 + [1.0] * 4
    for row in table.itertuples():
        ids = torch.tensor([prompt_ids(prompts[row.example]["prompt"], tokenizer)])
        with steering(model, row.multiplier):
            output = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0
            )
        answer = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
        assert (row.checksum, row.words) == (sum(answer.encode()), len(answer.split()))
