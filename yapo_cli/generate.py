"""`yapo generate`: answer prompts or chat at several multipliers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options


def generate(
    adapter: options.Adapter,
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts, each answered at each multiplier.")] = None,
    file: Annotated[Path | None, typer.Option(help="File with one prompt per line.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Chat interactively; type `/help` for commands.")] = False,
    multipliers: options.Multipliers = options.Numbers((-1.0, 0.0, 1.0)),
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_new_tokens: options.MaxNewTokens = 128,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = 0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Repetition penalty; 1 for none. Small models may need 1.1.")
    ] = 1.0,
    plain: Annotated[bool, typer.Option("--plain", help="Do not apply the chat template.")] = False,
    batch_size: options.BatchSize = 8,
    base: options.BaseModel = None,
    dtype: options.DType = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Answer prompts at several multipliers.

    `yapo generate my-adapter "How are you?" --multipliers=-1,0,1`
    """
    said = [*(prompts or []), *(_lines(file) if file is not None else [])]
    if not 0 < repetition_penalty < math.inf:
        raise typer.BadParameter(f"--repetition-penalty {repetition_penalty:g}: must be above 0 (1 for none).")
    if chat == bool(said):
        raise typer.BadParameter("pass prompts or --file, or else --chat.")
    if chat and (as_json or plain):
        raise typer.BadParameter("--chat streams answers with the chat template: omit --json and --plain.")
    from yapo_peft import ConfigError
    from yapo_peft.scoring.checks import require_room
    from yapo_peft.scoring.pairs import prompt_ids
    from yapo_peft.tuner.blocks import base_of

    from .loading import load_adapter, load_tokenizer
    from .output import print_json

    tokenizer = load_tokenizer(adapter, base)
    generation: dict[str, Any] = {"max_new_tokens": max_new_tokens, "repetition_penalty": repetition_penalty}
    generation |= {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    is_plain = plain or not getattr(tokenizer, "chat_template", None)
    start = [] if system is None else [{"role": "system", "content": system}]
    if chat and is_plain:
        raise ConfigError("--chat needs a chat template: use a model whose tokenizer has one.")
    model = load_adapter(adapter, dtype, base)
    if chat:
        from .conversation import converse

        return converse(model, tokenizer, multipliers, start, seed, generation)
    before = "" if system is None else f"{system}\n\n"  # as with_system_prompt
    asked = {text: before + text if is_plain else [*start, {"role": "user", "content": text}] for text in said}
    rows = [(text, multiplier, prompt_ids(asked[text], tokenizer)) for text in said for multiplier in multipliers]
    require_room(base_of(model), max(len(ids) for _, _, ids in rows), max_new_tokens)
    found: list[dict[str, Any]] = []
    for place in range(0, len(rows), batch_size):
        found += _answered(model, tokenizer, rows[place : place + batch_size], seed + place, generation)
    if as_json:
        return print_json(found)
    for text in said:
        typer.secho(text, bold=True)
        for row in found[: len(multipliers)]:
            typer.echo(f"  {row['multiplier']:+g}  {row['answer']}")
        del found[: len(multipliers)]


def _answered(model: Any, tokenizer: Any, rows: list[Any], seed: int, generation: Any) -> list[dict[str, Any]]:
    import torch

    from yapo_peft import steering
    from yapo_peft.scoring.generation import answer

    texts, multipliers, ids = zip(*rows, strict=True)
    with steering(model, torch.tensor(multipliers)):
        answers = answer(model, tokenizer, list(ids), seed=seed, **generation)
    return [
        {"prompt": text, "multiplier": multiplier, "answer": said, "finished": finished}
        for text, multiplier, (said, finished) in zip(texts, multipliers, answers, strict=True)
    ]


def _lines(file: Path) -> list[str]:
    from yapo_peft.data.sources import BUILDERS

    if file.suffix.lower() in BUILDERS:
        raise typer.BadParameter(f"--file {file} is a dataset: pass one prompt per line, or use `yapo answers`.")
    found = [line for line in options.read_text(file).splitlines() if line.strip()]
    if not found:
        raise typer.BadParameter(f"--file {file} has no prompts: write one per line.")
    return found
