"""Makes preference pairs of prompts and chosen answers: what the model says by itself becomes the rejected answer.

    python -m yapo_peft.scripts.rejected --model google/gemma-2-2b-it --dataset rows.jsonl \
        --prompt question --chosen answer --output_dir pairs

`accelerate launch -m yapo_peft.scripts.rejected ...` shares the work among processes.
"""

from __future__ import annotations

import argparse

from accelerate import PartialState

from yapo_peft.data import generate_rejected, load_pairs
from yapo_peft.scripts.loading import load_model


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="name or path of a model, or of an adapter, which then steers")
    parser.add_argument("--dtype", default="auto", help="of the model's weights, such as bfloat16")
    parser.add_argument("--dataset", required=True, help="a file, or the name of a dataset on the Hub")
    parser.add_argument("--split", default="train")
    parser.add_argument("--prompt", default="prompt", help="column of the prompts")
    parser.add_argument("--chosen", default="chosen", help="column of the chosen answers")
    parser.add_argument("--plain", action="store_true", help="texts without a chat template")
    parser.add_argument("--output_dir", required=True, help="where answers and pairs go; the same for all processes")
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--shard_size", type=int, default=256, help="answers to a file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, help="sample at this one; 0 for the likeliest answers")
    parser.add_argument("--top_p", type=float, help="sample; without both, answers are as the model's config says")
    parser.add_argument("--push_to_hub", metavar="NAME", help="dataset repository to push the pairs to")
    return parser


def main() -> None:
    """Reads, generates and writes."""
    options = make_parser().parse_args()
    dataset = load_pairs(
        options.dataset,
        prompt=options.prompt,
        chosen=options.chosen,
        rejected=None,
        chat=not options.plain,
        split=options.split,
    )
    model, tokenizer = load_model(options.model, options.dtype)
    sampling = {name: getattr(options, name) for name in ("temperature", "top_p") if getattr(options, name) is not None}
    if sampling:
        sampling["do_sample"] = options.temperature != 0
    if options.temperature == 0:
        sampling = {"do_sample": False}
    pairs = generate_rejected(
        model.to(PartialState().device),
        tokenizer,
        dataset,
        options.output_dir,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        shard_size=options.shard_size,
        seed=options.seed,
        push_to_hub=options.push_to_hub,
        **sampling,
    )
    PartialState().print(f"{len(pairs)} pairs are in {options.output_dir}.")


if __name__ == "__main__":
    main()
