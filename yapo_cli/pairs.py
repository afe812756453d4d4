"""The options that say which preference pairs to read, the same in every command."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, cast, get_type_hints

import typer

# The parameter of a command that gets the arguments.
_GETS = "data"


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class PairArguments:
    """Which preference pairs to read, and how."""

    dataset: str | None = field(
        default=None,
        metadata=_help("Preference pairs: a CSV, JSON or Parquet file, a saved dataset, or a Hub dataset."),
    )
    prompt: str = field(
        default="prompt",
        metadata=_help(
            "Column with prompts, or a template such as '{context} {question}'; '' if answers start with theirs."
        ),
    )
    chosen: str = field(default="chosen", metadata=_help("Column with chosen answers."))
    rejected: str | None = field(default="rejected", metadata=_help("Column with rejected answers."))
    options: str = field(
        default="options",
        metadata=_help("Column with options of multiple-choice questions: the right one is chosen, another rejected."),
    )
    answer: str = field(default="answer", metadata=_help("Column with the right option of a multiple-choice question."))
    where: list[str] | None = field(
        default=None,
        metadata=_help("Keep only rows with this value, as column=value; repeat for other columns, or other values."),
    )
    system: str | None = field(default=None, metadata=_help("System prompt to add to each prompt."))
    plain: bool = field(default=False, metadata=_help("Leave texts as they are, without the chat template."))
    split: str = field(default="train", metadata=_help("Split of a Hub or saved dataset."))
    limit: int | None = field(default=None, metadata=_help("Maximum number of rows. Default: all."))

    def __post_init__(self) -> None:
        """Checks values of a YAML config, which may have any type.

        Raises:
            ConfigError: One does.
        """
        from yapo_peft import ConfigError
        from yapo_peft._utils import at_least

        if isinstance(self.where, str):
            self.where = [self.where]
        if self.limit is not None:
            at_least(1, limit=self.limit)
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name not in ("limit", "where", "plain") and not isinstance(value, str | None):
                raise ConfigError(f"{option.name}={value!r}: must be a text.")
        if not isinstance(self.where, list | None) or not all(isinstance(each, str) for each in self.where or []):
            raise ConfigError(f"where={self.where!r}: must be texts of the form column=value, such as country=UK.")

    def load(self, tokenizer: Any, rows: Any = None) -> Any:
        """Loads the pairs: as messages if the tokenizer has a chat template, unless `plain`.

        Args:
            tokenizer: The model's tokenizer.
            rows: The rows to read instead of `dataset`.

        Raises:
            ConfigError: `where` is not of the form column=value.
            DatasetError: The dataset cannot be read, or does not have these columns or rows.
        """
        from yapo_peft.data import choice_pairs, load_pairs, with_system_prompt

        chat = not self.plain and bool(getattr(tokenizer, "chat_template", None))
        rows = self._rows() if rows is None else rows
        if self._are_choices(rows.column_names):
            pairs = choice_pairs(self._choices(rows), chat=chat)
        else:
            columns: Any = {"prompt": self.prompt or None, "chosen": self.chosen, "rejected": self.rejected}
            pairs = load_pairs(rows, **columns, chat=chat)
        if self.system is not None:
            pairs = with_system_prompt(pairs, self.system)
        return self._first(pairs)

    def load_questions(self, *keep: str) -> Any:
        """Loads multiple-choice questions, with other columns to keep. Raises as `load`."""
        return self._first(self._choices(self._rows(), *keep))

    def load_prompts(self, tokenizer: Any) -> Any:
        """Loads prompts alone. Raises as `load`."""
        from yapo_peft.data import load_prompts, with_system_prompt

        chat = not self.plain and bool(getattr(tokenizer, "chat_template", None))
        prompts = load_prompts(self._rows(), prompt=self.prompt, chat=chat)
        return self._first(prompts if self.system is None else with_system_prompt(prompts, self.system))

    def require_defaults(self, *names: str, why: str) -> None:
        """Raises `ConfigError` if one of these options is given, because it would have no effect."""
        from yapo_peft import ConfigError

        for option in fields(self):
            value = getattr(self, option.name)
            if option.name in names and value != option.default:
                raise ConfigError(f"--{option.name} {value}: {why}")

    def require_unread(self, *but: str) -> None:
        """Raises `ConfigError` if an option, but for some, is given without --dataset."""
        names = {option.name for option in fields(self)} - set(but)
        self.require_defaults(*names, why="it is read with --dataset only.")

    def _rows(self) -> Any:
        from yapo_peft import ConfigError
        from yapo_peft.data import load_rows, where
        from yapo_peft.data.sources import distinct

        rows, wanted = load_rows(cast(str, self.dataset), self.split), {}
        for condition in self.where or []:
            column, equals, value = condition.partition("=")
            if not equals:
                raise ConfigError(f"--where {condition!r}: must be column=value, such as country=UK.")
            # Values are texts here, and may be numbers or booleans there.
            there = distinct(rows, column) if column in rows.column_names else []
            wanted.setdefault(column, []).extend([found for found in there if str(found) == value] or [value])
        return where(rows, **wanted) if wanted else rows

    def _are_choices(self, columns: list[str]) -> bool:
        from yapo_peft.data.preferences import pair_columns

        why = "options and answers are those of multiple-choice questions, which name no other column of answers."
        if {self.options, self.answer} - {"options", "answer", None}:
            self.require_defaults("chosen", "rejected", why=why)
            return True
        is_default = self.chosen == "chosen" and self.rejected == "rejected"
        if not is_default or not {self.options, self.answer} <= set(columns):
            return False
        pairs = pair_columns(columns, self.prompt or None, self.chosen, self.rejected)
        return not {name for name in pairs if name is not None} <= set(columns)

    def _choices(self, rows: Any, *keep: str) -> Any:
        from yapo_peft.data import load_choices

        question = "question" if self.prompt == "prompt" and "prompt" not in rows.column_names else self.prompt
        return load_choices(rows, question=question, options=self.options, answer=self.answer, keep=list(keep))

    def _first(self, rows: Any) -> Any:
        return rows if self.limit is None else rows.select(range(min(self.limit, len(rows))))


@dataclass
class TrainingPairs(PairArguments):
    """Which pairs to train on, and which to hold out."""

    eval_split: str | None = field(
        default=None,
        metadata=_help(
            "Pairs to evaluate on, after each epoch unless --eval_strategy says when: a share of --dataset, such as "
            "0.1, a split of it, such as test, or another dataset. caa and sas leave them out."
        ),
    )

    def load_both(self, tokenizer: Any, seed: int) -> tuple[Any, Any]:
        """Loads the pairs to train on, and those to evaluate on, None without `eval_split`.

        Raises:
            ConfigError: `eval_split` is not a share.
            DatasetError: As `load`.
        """
        from yapo_peft import ConfigError

        pairs = self.load(tokenizer)
        if self.eval_split is None:
            return pairs, None
        try:
            share = float(self.eval_split)
        except ValueError:
            # Datasets on the Hub have a slash in their names, or are named by paths here.
            is_split = "/" not in self.eval_split and not Path(self.eval_split).exists()
            other = {"split": self.eval_split} if is_split and not Path(self.eval_split).suffix else None
            return pairs, replace(self, **(other or {"dataset": self.eval_split, "split": "train"})).load(tokenizer)
        if not 0 < share < 1 or not 1 <= round(share * len(pairs)) < len(pairs):
            raise ConfigError(
                f"eval_split={self.eval_split} of {len(pairs)} pairs: must be a share that leaves pairs to train "
                "on and to evaluate on, such as 0.1, or a dataset."
            )
        parts = pairs.train_test_split(round(share * len(pairs)), seed=seed)
        return parts["train"], parts["test"]


def reads_pairs(*left_out: str, required: bool = True, **defaults: Any) -> Callable[[Callable[..., None]], Any]:
    """Adds the options of `PairArguments` to a command, which gets them as `data`.

    Args:
        *left_out: Options that the command does not have.
        required: Whether --dataset is.
        **defaults: Where they differ.
    """
    types = get_type_hints(PairArguments)
    options = [option for option in fields(PairArguments) if option.name not in left_out]
    added: list[inspect.Parameter] = []
    for option in options:
        name = option.name
        is_required = required and name == "dataset"
        kind = str if is_required else types[name]
        text = option.metadata["help"].removesuffix(" Default: all." if name in defaults else "")
        flag = typer.Option(f"--{name}", help=text, min=1 if name == "limit" else None)
        default = inspect.Parameter.empty if is_required else defaults.get(name, option.default)
        kwargs: dict[str, Any] = {"default": default, "annotation": Annotated[kind, flag]}
        added.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, **kwargs))

    def add(command: Callable[..., None]) -> Any:
        @wraps(command)
        def run(**values: Any) -> None:
            given = {o.name: values.pop(o.name, defaults.get(o.name, o.default)) for o in options}
            command(**values, **{_GETS: PairArguments(**dict.fromkeys(left_out), **given)})

        own = inspect.signature(command, eval_str=True).parameters.values()
        listed: list[inspect.Parameter] = []
        for parameter in own:
            listed += added if parameter.name == _GETS else [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
        cast(Any, run).__signature__ = inspect.Signature(listed)
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in listed}
        return run

    return add
