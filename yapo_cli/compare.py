"""`yapo compare`: compare adapters at equal damage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .pairs import PairArguments, reads_pairs

if TYPE_CHECKING:
    from yapo_peft.evaluation import Scores


@reads_pairs()
def compare(
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER...", help="Folders or Hub repositories.")],
    data: PairArguments,
    text: Annotated[
        Path | None,
        typer.Option(help="Text file to measure damage on. Default: the package's neutral text, without chats."),
    ] = None,
    blocks: Annotated[int, typer.Option(min=1, help="Blocks of up to 256 tokens of the text to read.")] = 32,
    levels: Annotated[
        options.Numbers,
        typer.Option(parser=options.numbers, metavar="NUMBERS", help="Damage to compare at: KL in nats per token."),
    ] = options.Numbers((0.1, 0.3)),
    multipliers: options.Multipliers = options.Numbers((-2.5, -1.0, 0.0, 1.0, 2.5)),
    batch_size: options.BatchSize = 8,
    base: options.BaseModel = None,
    dtype: options.DType = "auto",
    plot: Annotated[Path | None, typer.Option(help="Save a plot of gain against damage, such as gains.png.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Compare adapters by how far they move the margin of pairs, in both directions, where they do the same damage.

    `difference` compares each gain with the first adapter's on the same pairs. A LoRA can be one of the adapters:
    multipliers scale its update.

    `yapo compare yapo-adapter bipo-adapter --dataset test.csv --text wiki.txt`
    """
    from yapo_peft import sweep
    from yapo_peft.evaluation import Damage, Scores
    from yapo_peft.evaluation.plots import plot_matched_damage, require_plot_path
    from yapo_peft.scoring.neutral import packaged_text

    from .loading import with_each_adapter
    from .output import plot_title, print_table

    names = options.short_names(adapters)
    if 0.0 not in multipliers or not min(multipliers) < 0 < max(multipliers):
        raise typer.BadParameter(f"--multipliers {','.join(map(str, multipliers))}: must be on both sides of 0, and 0.")
    if not levels or min(levels) <= 0:
        raise typer.BadParameter(f"--levels {','.join(map(str, levels))}: must be positive.")
    if plot is not None:
        require_plot_path(plot)
    neutral = (row["text"] for row in packaged_text() if "text" in row)
    rows = list(neutral) if text is None else [options.read_text(text)]

    models: set[str] = set()

    def measure(_: str, model: Any, tokenizer: Any, pairs: Any) -> tuple[Scores, Scores]:
        models.add(model.config.name_or_path)
        effect = sweep(model, pairs, tokenizer, multipliers, batch_size=batch_size)
        damage = sweep(model, rows, tokenizer, multipliers, measure=Damage(max_blocks=blocks), batch_size=batch_size)
        return effect, damage

    measured = with_each_adapter(adapters, data.load, measure, dtype, base, any_method=True)
    effects, damages = (
        Scores.concat([scores.labelled(adapter=name) for name, scores in zip(names, part, strict=True)])
        for part in zip(*measured, strict=True)
    )
    gains = effects.gains("margin")
    table = _both_sides(gains, damages, list(levels), {"adapter": names[0]} if len(names) > 1 else None)
    print_table(table, as_json)
    reached: Any = damages.table.groupby(["adapter", "multiplier"], as_index=False)["kl"].mean()
    for row in table[table["gain"].isna()].to_dict("records"):
        sign = "+" if row["direction"] == "up" else "-"
        own = reached[reached["adapter"] == row["adapter"]]
        most = own[own["multiplier"] * (1 if sign == "+" else -1) > 0]["kl"].max()
        typer.echo(
            f"{row['adapter']} reaches a KL of {most:.3g} at {sign}, not {row['kl']:g}: extend --multipliers.", err=True
        )
    if plot is not None:
        curve = _both_sides(gains, damages, [max(levels) * step / 8 for step in range(9)])
        curve["kl"] = curve["kl"].where(curve.pop("direction") == "up", -curve["kl"])
        title = plot_title("gain at equal damage", data.dataset, *models)
        plot_matched_damage(curve.sort_values("kl"), plot, title, metric="gain")


def _both_sides(gains: Scores, damages: Scores, levels: list[float], reference: dict[str, str] | None = None) -> Any:
    """The table of gains at each level of damage, at positive multipliers ("up") and at negative ones ("down")."""
    import pandas as pd

    from yapo_peft.evaluation import at_matched_damage

    found: list[Any] = []
    for direction in ("up", "down"):
        negative = direction == "down"
        table = at_matched_damage(gains, damages, levels, metric="gain", negative=negative, reference=reference)
        table.insert(1, "direction", direction)
        found.append(table)
    return pd.concat(found, ignore_index=True)
