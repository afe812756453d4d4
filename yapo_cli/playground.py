"""`yapo app`: a local playground."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options


def playground(
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER...|MODEL", help="Adapters of the same model, or a model and an SAE.")
    ],
    layers: Annotated[str | None, typer.Option(metavar="NUMBERS", help="Layers that the SAEs of a model read.")] = None,
    sae_release: options.SaeRelease = None,
    sae_id: options.SaeId = None,
    sae_path: options.SaePath = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    strongest: Annotated[float, typer.Option(help="Largest multiplier of the sliders.")] = 4.0,
    save_to: Annotated[Path, typer.Option(help="Folder to save adapters in.")] = Path("out/app"),
    base: options.BaseModel = None,
    dtype: options.DType = "auto",
) -> None:
    """Start a local web page to adjust adapters and features, and compare answers side by side.

    With a model and an SAE instead of adapters, you find features on the page and save them as an adapter:
    `yapo app google/gemma-2-2b-it --layers 15 --sae-release gemma-scope-2b-pt-res --sae-id ...`
    """
    from yapo_peft.app import Playground, build_page, serve_page

    from .loading import attach_adapter, load_adapter, load_tokenizer
    from .lookup import is_adapter

    _require_free(port)
    first, *others = adapters
    saes: dict[str, Any] = {"sae_release": sae_release, "sae_id": sae_id, "sae_path": sae_path}
    given = [f"--{name.replace('_', '-')}" for name, value in {"layers": layers, **saes}.items() if value]
    if not is_adapter(first) and not given:
        raise typer.BadParameter(
            f"{first} is not a YaPO adapter: pass one; or a model with --layers and --sae-path, or --sae-release and "
            "--sae-id."
        )
    if is_adapter(first):
        if given:
            raise typer.BadParameter(f"{given[0]}: the adapter {first} has its own.")
        model = load_adapter(first, dtype, base, named=True)
    else:
        if layers is None:
            raise typer.BadParameter("pass --layers, the layers that the SAEs read.")
        if base is not None:
            raise typer.BadParameter(f"--model {base}: {first} is a model.")
        model = attach_adapter(first, dtype, "features", layers=options.layer_indices(layers), **saes).eval()
    opened = Playground(model, load_tokenizer(first, base), save_to)
    for source in others:
        opened.load(source)
    page = build_page(opened, strongest)
    print(f"The playground is at {serve_page(page, port)}. Press Ctrl-C to stop.", flush=True)
    page.block_thread()


def _require_free(port: int) -> None:
    """Raises `typer.BadParameter` if a port is in use."""
    import socket

    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("127.0.0.1", port))
        except OSError as error:
            raise typer.BadParameter(f"--port {port}: {error.strerror}. Pass another one.") from error
