"""`yapo calibrate`: scale an adapter so that multiplier 1 is a stated damage."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options


def calibrate(
    adapter: options.Adapter,
    out: options.NewFolder,
    max_kl: Annotated[float, typer.Option(help="Damage: KL in nats per token.")] = 0.1,
    text: options.NeutralText = None,
    base: options.BaseModel = None,
    dtype: options.DType = "auto",
) -> None:
    """Scale an adapter so that multipliers +1 and -1 do a stated damage on neutral text, or less where one has to.

    Entries above 0 act at +1 and those below 0 at -1: a code without one kind does little in that direction. It takes a
    dozen passes over 64 rows of text.

    `yapo calibrate my-adapter --max-kl 0.1 --out my-adapter-calibrated`
    """
    from yapo_peft import calibrate as calibrated
    from yapo_peft.adapter_file.saving import save_adapter
    from yapo_peft.scoring.calibration import require_bound

    from .loading import load_adapter, load_tokenizer

    require_bound(max_kl)
    dataset = options.paragraphs(text) if text else None
    model, tokenizer = load_adapter(adapter, dtype, base), load_tokenizer(adapter, base)
    damage = calibrated(model, tokenizer, max_kl, dataset=dataset)
    typer.echo(f"KL {damage['plus']:.3g} nats per token at multiplier +1, {damage['minus']:.3g} at -1.")
    typer.echo(f"Saved to {save_adapter(model, out)}.")
