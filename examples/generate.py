"""Generates answers to a prompt with a saved adapter at several multipliers.

python examples/generate.py out/demo/adapter "How do I make a good cup of tea?" --multipliers -1 0 1
"""

from __future__ import annotations

import argparse

import torch
from peft import AutoPeftModelForCausalLM
from peft.utils import infer_device
from transformers import AutoTokenizer

from yapo_peft import steering


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="folder or Hub id of an adapter")
    parser.add_argument("prompt", help="the user's message")
    parser.add_argument("--multipliers", nargs="+", type=float, default=[-1.0, 0.0, 1.0])
    parser.add_argument("--max-new-tokens", type=int, default=48)
    options = parser.parse_args()
    model = AutoPeftModelForCausalLM.from_pretrained(options.adapter).to(infer_device())
    tokenizer = AutoTokenizer.from_pretrained(model.peft_config["default"].base_model_name_or_path)
    for multiplier in options.multipliers:
        (answer,) = answers(model, tokenizer, [options.prompt], multiplier, options.max_new_tokens)
        print(f"--- multiplier {multiplier:+g}\n{answer}")


@torch.no_grad()
def answers(model, tokenizer, prompts: list[str], multiplier: float, max_new_tokens: int = 48) -> list[str]:
    """Greedy answers to prompts, each formatted as a chat with a single user message.

    A mild repetition penalty keeps the small embedded model from looping.
    """
    model.eval()
    texts = []
    for prompt in prompts:
        chat = [{"role": "user", "content": prompt}]
        rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        inputs = tokenizer(rendered, return_tensors="pt", add_special_tokens=False).to(model.device)
        with steering(model, multiplier):
            output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, repetition_penalty=1.1)
        texts.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


if __name__ == "__main__":
    main()
