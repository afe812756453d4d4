"""`yapo convert`: make an adapter of a TopK SAE small and self-contained."""

from __future__ import annotations

import typer

from . import options


def convert(
    adapter: options.Adapter,
    out: options.NewFolder,
    text: options.NeutralText = None,
    base: options.BaseModel = None,
    dtype: options.DType = "auto",
) -> None:
    """Convert the TopK SAEs of an adapter to JumpReLU: small, self-contained, for multipliers of both signs.

    `yapo convert my-adapter --out my-adapter-alone`
    """
    from yapo_peft.adapter_file.saving import save_adapter
    from yapo_peft.methods import convert_to_jumprelu

    from .loading import load_adapter, load_tokenizer

    dataset = options.paragraphs(text) if text else None
    model, tokenizer = load_adapter(adapter, dtype, base), load_tokenizer(adapter, base)
    found = convert_to_jumprelu(model, tokenizer, dataset)
    typer.echo(
        f"On held-out text, predictions differ by KL {found['kl_plus']:.3g} nats per token at multiplier +1 and "
        f"{found['kl_minus']:.3g} at -1, {100 * found['differ']:.1f} % of the code's active features are not active in "
        f"both SAEs, and activations differ by {100 * found['error']:.1f} % of their sum."
    )
    typer.echo(f"Saved to {save_adapter(model, out)}.")
