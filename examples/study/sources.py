"""What the study reads: preference pairs split three ways, culture, facts and neutral text."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from yapo_peft.data import load_choices, load_pairs, where

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Behaviour:
    """Pairs of one behaviour, no question of which is in two splits, and system prompts that ask for it by sign."""

    name: str
    train: Dataset
    validation: Dataset
    test: Dataset
    prompts: dict[int, str]


def load_behaviour(name: str, entry: dict[str, Any], sizes: dict[str, int], folder: Path) -> Behaviour:
    """Reads a behaviour; validation pairs, and test pairs without a file of their own, are from the train file."""
    columns = entry.get("columns", {})
    rows = distinct_questions(load_pairs(folder / entry["train"], **columns)).shuffle(seed=0)
    test = None
    if "test" in entry:
        test = distinct_questions(load_pairs(folder / entry["test"], **columns)).shuffle(seed=0)
    if test is not None:
        taken = set(map(_question, test))
        rows = rows.filter(lambda row: _question(row) not in taken)
    else:
        test, rows = rows.select(range(sizes["test"])), rows.select(range(sizes["test"], len(rows)))
    wanted = sizes["validation"] + sizes["train"]
    if len(rows) < wanted or len(test) < sizes["test"]:
        raise SystemExit(
            f"{name} has {len(rows)} pairs to train on and {len(test)} to test on; the study wants {wanted} and "
            f"{sizes['test']}: lower `pairs` in its config."
        )
    return Behaviour(
        name,
        train=rows.select(range(sizes["validation"], wanted)),
        validation=rows.select(range(sizes["validation"])),
        test=test.select(range(sizes["test"])),
        prompts=entry["prompts"],
    )


def load_culture(country: str, file: Path, questions: int, prompt: str, sizes: dict[str, int]) -> Culture:
    """Reads a country's pairs, and test questions that name the country and the same ones that do not.

    A question and its twin without the country are in the same split.
    """
    keep = ["id", "localization_status", "split"]
    pairs = where(load_pairs(file, prompt="question", keep=keep), split="train")
    draw = random.Random(0)
    ids = sorted(set(pairs["id"]))
    validation = draw.sample(ids, min(sizes["validation"], len(ids) // 5))
    train = where(pairs, id=sorted(set(ids) - set(validation))).shuffle(seed=0)
    choices = where(load_choices(file, answer="answer_index", keep=keep), split="test")
    kinds = {kind: where(choices, localization_status=kind) for kind in ("localized", "nonlocalized")}
    asked = sorted(set.intersection(*(set(kind["id"]) for kind in kinds.values())))
    asked = draw.sample(asked, min(questions, len(asked)))
    behaviour = Behaviour(
        f"culture of {country}",
        train=train.select(range(min(sizes["train"], len(train)))),
        validation=where(pairs, id=validation),
        test=pairs.select(range(0)),
        prompts={1: prompt.format(country=country)},
    )
    return Culture(country, behaviour, {name: where(kind, id=asked).sort("id") for name, kind in kinds.items()})


@dataclass(frozen=True)
class Culture:
    """Pairs of one country to train on, and its test questions by whether they name it."""

    country: str
    behaviour: Behaviour
    questions: dict[str, Dataset]


def load_texts(folder: Path, entry: dict[str, Any], tokenizer: Any) -> list[str]:
    """Neutral texts to measure damage on: running text, conversations, or the questions of general knowledge.

    Args:
        folder: Folder of the study's data.
        entry: `file` of running text, or of rows with the columns that `chat` names, as a user's message and its
            answer; or `facts`.
        tokenizer: The model's, whose chat template renders conversations.
    """
    if "facts" in entry:
        return [f"{row['question']} {row['options'][row['answer']]}." for row in load_facts(None)]
    if "chat" not in entry:
        return [(folder / entry["file"]).read_text()]
    question, answer = entry["chat"]
    rows = [json.loads(line) for line in (folder / entry["file"]).read_text().splitlines()]
    random.Random(0).shuffle(rows)
    chats = [_messages("user", row[question]) + _messages("assistant", row[answer]) for row in rows[: entry["rows"]]]
    return [tokenizer.apply_chat_template(messages, tokenize=False) for messages in chats]


def _messages(role: str, content: Any) -> list[dict[str, Any]]:
    return content if isinstance(content, list) else [{"role": role, "content": content}]


def distinct_questions(pairs: Dataset) -> Dataset:
    """The first pair of each question, so that splits share none."""
    first = {_question(row): index for index, row in reversed(list(enumerate(pairs)))}
    return pairs.select(sorted(first.values()))


def load_facts(count: int | None) -> Dataset:
    """Questions of general knowledge with four options, all if None: relations of facts.json, and products."""
    draw = random.Random(0)
    rows = []
    for relation in json.loads((HERE / "facts.json").read_text()).values():
        for subject, answer in relation["answers"].items():
            others = sorted(set(relation["answers"].values()) - {answer})
            rows.append((relation["question"].format(subject), answer, draw.sample(others, 3)))
    for first in range(2, 10):
        for second in range(first, 10):
            wrong = draw.sample([n for n in range(2, 82) if n != first * second], 3)
            rows.append((f"What is {first} times {second}?", str(first * second), list(map(str, wrong))))
    draw.shuffle(rows)
    return Dataset.from_list([_choice(draw, *row) for row in rows[:count]])


def _choice(draw: random.Random, question: str, answer: str, wrong: list[str]) -> dict[str, Any]:
    options = [answer, *wrong]
    draw.shuffle(options)
    return {"question": question, "options": options, "answer": options.index(answer)}


def _question(row: dict[str, Any]) -> str:
    return row["prompt"][0]["content"].strip()
