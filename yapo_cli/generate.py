"""`yapo generate`: answers at several multipliers, of a batch of prompts or in a conversation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Adapter, AsJson, BatchSize, DType, Multipliers, Numbers, read_text

_MULTIPLIERS = Numbers((-1.0, 0.0, 1.0))


def generate(
    adapter: Adapter,
    prompts: Annotated[
        list[str] | None, typer.Argument(help="What to say; each is answered at each multiplier.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Prompts, one to a line.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Converse; `/help` says what else can be typed.")] = False,
    multipliers: Multipliers = _MULTIPLIERS,
    system: Annotated[str | None, typer.Option(help="What the system says first.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 for the likeliest tokens.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    repetition_penalty: Annotated[
        float, typer.Option(help="1 for none; small models repeat themselves less at 1.1.")
    ] = 1.0,
    plain: Annotated[bool, typer.Option("--plain", help="Give texts to the model without its chat template.")] = False,
    batch_size: BatchSize = 8,
    dtype: DType = "auto",
    as_json: AsJson = False,
) -> None:
    """Answer prompts at several multipliers.

    `yapo generate my-adapter "How are you?" --multipliers=-1,0,1`
    """
    said = [*(prompts or []), *(_lines(file) if file is not None else [])]
    if repetition_penalty <= 0:
        raise typer.BadParameter(f"--repetition-penalty {repetition_penalty:g}: give a number above 0; 1 is none.")
    if chat == bool(said):
        raise typer.BadParameter("give prompts or --file, or else --chat.")
    if chat and (as_json or plain):
        raise typer.BadParameter(
            "--chat prints answers as they are written, by the chat template: leave --json and --plain."
        )
    from yapo_peft import ConfigError
    from yapo_peft.scoring.pairs import prompt_ids

    from .loading import load_adapter, load_tokenizer
    from .output import print_json

    tokenizer = load_tokenizer(adapter)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "repetition_penalty": repetition_penalty}
    options |= {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    is_chat_model = bool(getattr(tokenizer, "chat_template", None))
    start = [] if system is None else [{"role": "system", "content": system}]
    if (chat or system is not None) and (plain or not is_chat_model):
        raise ConfigError(
            "--chat and --system need a chat template, which this model's tokenizer lacks or --plain leaves."
        )
    model = load_adapter(adapter, dtype)
    if chat:
        from .conversation import converse

        return converse(model, tokenizer, multipliers, start, seed, options)
    rows = [
        (text, multiplier, prompt_ids(text if plain or not is_chat_model else [*start, _user(text)], tokenizer))
        for text in said
        for multiplier in multipliers
    ]
    found: list[dict[str, Any]] = []
    for place in range(0, len(rows), batch_size):
        found += _answered(model, tokenizer, rows[place : place + batch_size], seed + place, options)
    if as_json:
        return print_json(found)
    for text in said:
        typer.secho(text, bold=True)
        for row in found[: len(multipliers)]:
            typer.echo(f"  {row['multiplier']:+g}  {row['answer']}")
        del found[: len(multipliers)]


def _answered(model: Any, tokenizer: Any, rows: list[Any], seed: int, options: Any) -> list[dict[str, Any]]:
    import torch

    from yapo_peft import steering
    from yapo_peft.scoring.generation import answer

    texts, multipliers, ids = zip(*rows, strict=True)
    with steering(model, torch.tensor(multipliers)):
        answers = answer(model, tokenizer, list(ids), seed=seed, **options)
    return [
        {"prompt": text, "multiplier": multiplier, "answer": said, "finished": finished}
        for text, multiplier, (said, finished) in zip(texts, multipliers, answers, strict=True)
    ]


def _lines(file: Path) -> list[str]:
    found = [line for line in read_text(file).splitlines() if line.strip()]
    if not found:
        raise typer.BadParameter(f"--file {file} has no prompt: write one to a line.")
    return found


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}
