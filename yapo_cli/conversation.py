"""A conversation at one or several multipliers, each with its own history."""

from __future__ import annotations

import sys
from io import TextIOWrapper
from typing import Any

import typer

from .options import numbers

_HELP = """Type a message and press Enter. Or:
  /multiplier -1,0,1   change the multipliers; new ones continue the first one's conversation
  /reset               start over
  /quit                exit (also Ctrl-D)"""


def converse(
    model: Any, tokenizer: Any, multipliers: tuple[float, ...], start: list[dict[str, str]], seed: int, options: Any
) -> None:
    """Answers messages from standard input until it ends."""
    talks = {multiplier: list(start) for multiplier in multipliers}
    if sys.stdin.isatty():
        typer.echo(_HELP)
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    while (said := _read()) is not None:
        if not said:
            continue
        if said == "/quit":
            return
        if said == "/reset":
            talks = {multiplier: list(start) for multiplier in talks}
        elif said.startswith("/multiplier"):
            talks = _changed(talks, said.removeprefix("/multiplier").strip())
        elif said.startswith("/"):
            typer.echo(_HELP if said == "/help" else f"Unknown command {said.split()[0]}.\n{_HELP}")
        else:
            for multiplier, messages in talks.items():
                messages.append({"role": "user", "content": said})
                typer.secho(f"[{multiplier:+g}] ", nl=False, bold=True)
                messages.append(
                    {"role": "assistant", "content": _said(model, tokenizer, messages, multiplier, seed, options)}
                )


def _read() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _changed(talks: dict[float, list[Any]], asked: str) -> dict[float, list[Any]]:
    try:
        multipliers = numbers(asked)
    except typer.BadParameter as error:
        typer.echo(error.message)
        return talks
    first = next(iter(talks.values()))
    return {multiplier: list(talks.get(multiplier, first)) for multiplier in multipliers}


def _said(model: Any, tokenizer: Any, messages: list[Any], multiplier: float, seed: int, options: Any) -> str:
    """Streams one answer and returns it."""
    import torch
    from transformers import TextStreamer

    from yapo_peft import steering
    from yapo_peft.scoring.pairs import prompt_ids

    ids = torch.tensor([prompt_ids(messages, tokenizer)], device=model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    torch.manual_seed(seed + len(messages))
    with torch.no_grad(), steering(model, multiplier):
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), streamer=streamer, **options)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
