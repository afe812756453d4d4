"""`yapo app`: a playground on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="yapo app",
        description="Opens a page on this machine to dial adapters and single features, and to read answers with and "
        "without them side by side.",
    )
    parser.add_argument("adapters", nargs="+", help="names or paths of adapters of one model")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--dtype", default="auto", help="of the model's weights, such as bfloat16")
    parser.add_argument("--strongest", type=float, default=4.0, help="ends of the strength sliders")
    parser.add_argument("--save_to", type=Path, default=Path("out/app"), help="folder for adapters that are saved")
    return parser


def app(arguments: list[str]) -> int:
    """Loads the model, and serves the page until it is interrupted."""
    options = make_parser().parse_args(arguments)
    from peft import PeftModel
    from peft.utils import infer_device

    from ..app import Playground, build_page
    from ..errors import ConfigError
    from ..scripts.loading import load_model

    first, *others = options.adapters
    model, tokenizer = load_model(first, options.dtype)
    if not isinstance(model, PeftModel):
        raise ConfigError(f"{first!r} is a model without an adapter: name an adapter.")
    playground = Playground(model.to(infer_device()).eval(), tokenizer, options.save_to)
    for source in others:
        playground.load(source)
    page = build_page(playground, options.strongest)
    page.launch(server_name="127.0.0.1", server_port=options.port, share=False, quiet=True, prevent_thread_lock=True)
    print(f"The playground is at http://127.0.0.1:{options.port} until you press Ctrl-C.", flush=True)
    page.block_thread()
    return 0
