"""A conversation at one or several strengths, each with a memory of its own."""

from __future__ import annotations

import sys
from io import TextIOWrapper
from typing import Any

import typer

from .options import numbers

_HELP = """Type a message and press Enter. Or:
  /strength -1,0,1   answer at these strengths from now on; each goes on from what was said first
  /reset             forget what was said
  /quit              end (so does Ctrl-D)"""


def converse(
    model: Any, tokenizer: Any, strengths: tuple[float, ...], start: list[dict[str, str]], seed: int, options: Any
) -> None:
    """Reads messages and answers them, until the input ends."""
    talks = {strength: list(start) for strength in strengths}
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
            talks = {strength: list(start) for strength in talks}
        elif said.startswith("/strength"):
            talks = _changed(talks, said.removeprefix("/strength").strip())
        elif said.startswith("/"):
            typer.echo(_HELP if said == "/help" else f"There is no {said.split()[0]}.\n{_HELP}")
        else:
            for strength, messages in talks.items():
                messages.append({"role": "user", "content": said})
                typer.secho(f"[{strength:+g}] ", nl=False, bold=True)
                messages.append(
                    {"role": "assistant", "content": _said(model, tokenizer, messages, strength, seed, options)}
                )


def _read() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _changed(talks: dict[float, list[Any]], asked: str) -> dict[float, list[Any]]:
    try:
        strengths = numbers(asked)
    except typer.BadParameter as error:
        typer.echo(error.message)
        return talks
    first = next(iter(talks.values()))
    return {strength: list(talks.get(strength, first)) for strength in strengths}


def _said(model: Any, tokenizer: Any, messages: list[Any], strength: float, seed: int, options: Any) -> str:
    """One answer, printed as it is written."""
    import torch
    from transformers import TextStreamer

    from yapo_peft import steering
    from yapo_peft.pairs import prompt_ids

    ids = torch.tensor([prompt_ids(messages, tokenizer)], device=model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    torch.manual_seed(seed + len(messages))
    with torch.no_grad(), steering(model, strength):
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), streamer=streamer, **options)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
