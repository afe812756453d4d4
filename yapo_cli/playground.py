"""`yapo app`: a local playground."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options


def playground(
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER...", help="Adapters of the same model.")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    strongest: Annotated[float, typer.Option(help="Largest multiplier of the sliders.")] = 4.0,
    save_to: Annotated[Path, typer.Option(help="Folder to save adapters in.")] = Path("out/app"),
    base: options.BaseModel = None,
    dtype: options.DType = "auto",
) -> None:
    """Start a local web page to adjust adapters and features, and compare answers side by side."""
    from yapo_peft.app import Playground, build_page, serve_page

    from .loading import load_adapter, load_tokenizer

    first, *others = adapters
    opened = Playground(load_adapter(first, dtype, base), load_tokenizer(first, base), save_to)
    for source in others:
        opened.load(source)
    page = build_page(opened, strongest)
    print(f"The playground is at {serve_page(page, port)}. Press Ctrl-C to stop.", flush=True)
    page.block_thread()
