"""Multiple choice, by likelihood and by generated answers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .._utils import choice
from ..data.choices import choice_prompt, letters
from ..errors import DatasetError
from ..scoring.lm_head import answer_logps, log_probs_of_answers
from ..scoring.pairs import common_prefix, padded_answers, padding_of, prompt_ids
from .preference import share_above_zero

Normalisation = Literal["none", "tokens", "characters"]


@dataclass(frozen=True)
class MultipleChoice:
    """Reads questions with `question`, `options` and `answer`, as `yapo_peft.data.load_choices` returns them.

    Metrics of a question: `accuracy`, 1 if the right option is the most likely one; `right`, its score; `margin`, its
    score minus that of the best wrong one, in nats. An option's score is the log-probability of its tokens.

    Attributes:
        form: "letter" lists the options in the question and scores their letters; "text" shows only the question and
            scores the options' texts.
        normalise: "none" sums over tokens; "tokens" takes the mean, which does not favour short options; "characters"
            divides the sum by the text's length, which does not depend on the tokenizer.
        chat: Whether to render the question as a user message; False for models without a chat template, which
            complete `question` and "Answer:".
        system_prompt: System prompt before each question, as a baseline for steering.
    """

    form: str = "letter"
    normalise: str = "none"
    chat: bool = True
    system_prompt: str | None = None

    def __post_init__(self) -> None:
        choice(get_args(Normalisation), normalise=self.normalise)
        choice_prompt("", [], self.form)  # raises for an unknown form

    def batches(
        self, dataset: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, batch_size: int
    ) -> list[dict[str, Tensor]]:
        """Batches of whole questions, with up to `batch_size` rows.

        If every option is one token, such as a letter, a question is one row; otherwise each option is a row.
        """
        questions = [self._tokenized(index, dict(row), tokenizer) for index, row in enumerate(dataset)]
        if not questions:
            raise DatasetError("The dataset is empty: it has no questions.")
        questions.sort(
            key=lambda question: (question.is_one_row, len(question.prompt) + max(map(len, question.options)))
        )
        batches: list[list[_Question]] = []
        for question in questions:
            last = batches[-1] if batches else []
            fits = sum(other.rows for other in last) + question.rows <= batch_size
            if last and fits and last[0].is_one_row == question.is_one_row:
                last.append(question)
            else:
                batches.append([question])
        return [_batch(questions, padding_of(tokenizer)) for questions in batches]

    def score(self, model: Any, batch: dict[str, Tensor], kept: dict[str, Any]) -> dict[str, Tensor]:
        """Metrics of each question, `(questions,)`."""
        rows = {name: batch[name] for name in ("input_ids", "attention_mask", "answer_mask")}
        if "candidates" in batch:
            next_token = torch.cat(list(log_probs_of_answers(model, **rows)))
            logps = next_token.gather(1, batch["candidates"])
        else:
            logps = answer_logps(model, **rows)[batch["row_of_option"]]
        if self.normalise != "none":
            logps = logps / batch[self.normalise]
        scores = logps.masked_fill(batch["tokens"] == 0, -torch.inf)
        right = scores.gather(1, batch["right"][:, None]).squeeze(1)
        best_wrong = scores.scatter(1, batch["right"][:, None], -torch.inf).amax(dim=1)
        return {"accuracy": share_above_zero(right - best_wrong), "right": right, "margin": right - best_wrong}

    def _tokenized(self, index: int, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> _Question:
        question, options, right = question_of(row)
        answers = letters(len(options)) if self.form == "letter" else options
        text = choice_prompt(question, options, self.form)
        prompt = _prompt(text, self.chat, self.system_prompt)
        ids = prompt_ids(prompt, tokenizer)
        if self.chat:
            rendered = cast(str, tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False))
            whole = [tokenizer(rendered + answer, add_special_tokens=False)["input_ids"] for answer in answers]
        else:
            whole = [tokenizer(f"{prompt} {answer}")["input_ids"] for answer in answers]
        # Some tokenizers merge the prompt's last token with the answer's first one.
        shared = min(common_prefix(ids, tokens) for tokens in whole)
        return _Question(index, ids[:shared], [tokens[shared:] for tokens in whole], right, list(map(len, answers)))


@dataclass(frozen=True)
class GeneratedChoice:
    """Reads the same questions, and finds the option that a generated answer names, by letter or by text.

    Metrics of a question: `accuracy`, 1 if the answer names the right option; `answered`, 1 if it names exactly one.

    Attributes:
        chat: As for `MultipleChoice`.
        system_prompt: As for `MultipleChoice`.
    """

    chat: bool = True
    system_prompt: str | None = None

    def prompts(self, dataset: Iterable[dict[str, Any]]) -> list[Any]:
        """The questions, with their options."""
        texts = [choice_prompt(*question_of(dict(row))[:2]) for row in dataset]
        return [_prompt(text, self.chat, self.system_prompt) for text in texts]

    def score_answers(self, dataset: Any, examples: Sequence[int], answers: Sequence[str]) -> list[dict[str, float]]:
        """Metrics of answers to questions."""
        found: list[dict[str, float]] = []
        for example, answer in zip(examples, answers, strict=True):
            _, options, right = question_of(dict(dataset[example]))
            named = named_option(answer, options)
            found.append({"accuracy": float(named == right), "answered": float(named is not None)})
        return found


def named_option(answer: str, options: Sequence[str]) -> int | None:
    r"""The option that an answer names; None if it names none, or several.

    The first of these rules that finds something decides:

    1. `\boxed{...}`, with a letter, a number from 1, or an option's text; the last one counts.
    2. A letter alone, or at the start before punctuation: "B", "B. Lyon", "(b)".
    3. "answer is B" or "Answer: B"; the last one counts.
    4. "B is correct" (or right), where one letter alone is said to be.
    5. "Option B", where it is the only one named.
    6. The text of an option, where no other's occurs. "New York City" does not also name "York".
    """
    names = "".join(letters(len(options)))
    boxed = last_boxed(answer)
    if boxed is not None:
        return _boxed(boxed, options, names)
    start = re.match(rf"\W*([{names}])(?=\W*$|\s*[.):,\n*-])", answer, re.IGNORECASE)
    if start is not None:
        return names.index(start.group(1).upper())
    stated = re.findall(rf"\b[Aa]nswer(?: is)?:?\W*([{names}])(?=\W*$|\s*[.):,\n*-])", answer)
    if stated:
        return names.index(stated[-1])
    for pattern in (rf"\b([{names}]) is (?:the )?(?:correct|right)\b", rf"\b[Oo]ption ([{names}])(?!\w)"):
        named = set(re.findall(pattern, answer))
        if len(named) == 1:
            return names.index(named.pop())
    told = [i for i, text in enumerate(options) if re.search(rf"(?<!\w){re.escape(text)}(?!\w)", answer, re.I)]
    longest = [i for i in told if not any(i != j and options[i].lower() in options[j].lower() for j in told)]
    return longest[0] if len(longest) == 1 else None


def last_boxed(answer: str) -> str | None:
    r"""The content of the last `\boxed{...}` of an answer; None if there is none."""
    boxed = re.findall(r"\\boxed\{\s*(?:\\text\{)?([^{}]*)\}", answer)
    return boxed[-1].strip() if boxed else None


def _boxed(content: str, options: Sequence[str], names: str) -> int | None:
    texts = [option.casefold() for option in options]
    if content.casefold() in texts:
        return texts.index(content.casefold())
    place = int(content) - 1 if content.isdecimal() else names.find(content.upper()) if len(content) == 1 else -1
    return place if 0 <= place < len(options) else None


def question_of(row: dict[str, Any]) -> tuple[str, list[str], int]:
    """Question, options and index of the right one.

    Raises:
        DatasetError: A column is missing or holds something else.
    """
    missing = [name for name in ("question", "options", "answer") if name not in row]
    if missing:
        raise DatasetError(
            f"A question lacks the columns {missing}; it has {sorted(row)}. Load questions with "
            "yapo_peft.data.load_choices."
        )
    options, answer = row["options"], row["answer"]
    if not isinstance(answer, int) or not 0 <= answer < len(options):
        raise DatasetError(
            f"answer={answer!r} is not an index of {len(options)} options: load questions with load_choices."
        )
    return row["question"], list(options), answer


def _prompt(text: str, chat: bool, system_prompt: str | None) -> Any:
    """A question as a chat, or as a text that the answer follows."""
    if not chat:
        return f"{system_prompt}\n\n{text}\nAnswer:" if system_prompt else f"{text}\nAnswer:"
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": text}]


@dataclass(frozen=True)
class _Question:
    example: int
    prompt: list[int]
    options: list[list[int]]
    right: int
    characters: list[int]

    @property
    def is_one_row(self) -> bool:
        return all(len(option) == 1 for option in self.options)

    @property
    def rows(self) -> int:
        return 1 if self.is_one_row else len(self.options)


def _batch(questions: list[_Question], padding: int) -> dict[str, Tensor]:
    """The model's rows, and tables of each question's options, `(questions, options)`, padded with 0."""
    width = max(len(question.options) for question in questions)

    def table(values: list[list[int]]) -> Tensor:
        return torch.tensor([[*row, *([0] * (width - len(row)))] for row in values])

    if questions[0].is_one_row:
        # Only the next token after the prompt is read, so that any option will do.
        rows = padded_answers([(question.prompt, question.options[0]) for question in questions], padding)
        rows["candidates"] = table([[option[0] for option in question.options] for question in questions])
    else:
        pairs = [(question.prompt, option) for question in questions for option in question.options]
        rows = padded_answers(pairs, padding)
        starts = torch.tensor([0, *(len(question.options) for question in questions)]).cumsum(0).tolist()
        indices = [list(range(start, end)) for start, end in pairwise(starts)]
        rows["row_of_option"] = table(indices)
    return {
        **rows,
        "tokens": table([[len(option) for option in question.options] for question in questions]),
        "characters": table([question.characters for question in questions]),
        "right": torch.tensor([question.right for question in questions]),
        "example": torch.tensor([question.example for question in questions]),
    }
