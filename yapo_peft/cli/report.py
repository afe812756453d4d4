"""`yapo report`: one page about an adapter."""

from __future__ import annotations

import argparse
from pathlib import Path


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="yapo report",
        description="Measures an adapter and writes one HTML page: dose-response, side effects, features, attribution, "
        "answers. It needs no network to be read.",
    )
    parser.add_argument("adapter", help="name or path of an adapter")
    parser.add_argument(
        "--dataset", required=True, help="preference pairs: a CSV or JSON file, a folder, or a Hub name"
    )
    parser.add_argument("--prompt", default="prompt", help="column of the prompts")
    parser.add_argument("--chosen", default="chosen", help="column of the answers to prefer")
    parser.add_argument("--rejected", default="rejected", help="column of the other answers")
    parser.add_argument("--pairs", type=int, default=32, help="how many pairs to read, from the start")
    parser.add_argument("--text", type=Path, help="file of running text, for damage and contexts; the pairs if missing")
    parser.add_argument("--questions", help="JSON of question, options and answer, to check knowledge with")
    parser.add_argument("--multipliers", nargs="+", type=float, help="strengths of the dose-response")
    parser.add_argument("--multiplier", type=float, default=1.0, help="strength at which features are read")
    parser.add_argument("--top", type=int, default=20, help="features to list for each block")
    parser.add_argument("--attributed", type=int, default=16, help="features to leave out one by one; 0 for none")
    parser.add_argument("--answers", type=int, default=3, help="prompts to answer")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--dtype", default="auto", help="of the model's weights, such as bfloat16")
    parser.add_argument("--no_labels", action="store_true", help="do not ask Neuronpedia for labels")
    parser.add_argument("--card", action="store_true", help="put the first features and a picture into its card, too")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="file to write")
    return parser


def report(arguments: list[str]) -> int:
    """Measures, and writes the page."""
    options = make_parser().parse_args(arguments)
    from peft.utils import infer_device

    from ..data import load_choices, load_pairs
    from ..errors import ConfigError
    from ..report import collect_report, save_page, write_short_form
    from ..report.contents import MULTIPLIERS, training_history
    from ..report.page import require_card, require_page
    from ..scripts.loading import load_model

    if options.pairs < 1:
        raise ConfigError(f"--pairs {options.pairs}: give one at least.")
    require_page(options.out)
    if options.card:
        require_card(options.adapter)
    text = None if options.text is None else _paragraphs(options.text.read_text(encoding="utf-8"))
    pairs = load_pairs(options.dataset, prompt=options.prompt, chosen=options.chosen, rejected=options.rejected)
    model, tokenizer = load_model(options.adapter, options.dtype)
    if not getattr(tokenizer, "chat_template", None):
        pairs = load_pairs(
            options.dataset, prompt=options.prompt, chosen=options.chosen, rejected=options.rejected, chat=False
        )
    contents = collect_report(
        model.to(infer_device()),
        pairs.select(range(min(options.pairs, len(pairs)))).to_list(),
        tokenizer,
        title=Path(options.adapter).name,
        text=text,
        questions=None if options.questions is None else load_choices(options.questions),
        history=training_history(options.adapter),
        multipliers=options.multipliers or MULTIPLIERS,
        multiplier=options.multiplier,
        top=options.top,
        attributed=options.attributed,
        prompts=options.answers,
        labels=not options.no_labels,
        batch_size=options.batch_size,
    )
    print(f"The report is in {save_page(contents, options.out)}.")
    if options.card:
        print(f"Its short form is in {write_short_form(contents, options.adapter)}.")
    return 0


def _paragraphs(text: str) -> list[str]:
    """The parts of a text between its empty lines, so that each is one text."""
    return [part.strip() for part in text.split("\n\n") if part.strip()] or [text]
