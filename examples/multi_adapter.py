"""Uses several adapters in one model: one per row of a batch, both at once, and combined into one.

python examples/multi_adapter.py out/demo/adapter out/caution/adapter "What should I do on a rainy Sunday?"

`make demo` trains the first adapter, `python examples/demo.py --set caution --out out/caution` the second.
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
    parser.add_argument("first", help="folder or Hub id of an adapter")
    parser.add_argument("second", help="another adapter for the same model and SAE")
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    options = parser.parse_args()
    model = AutoPeftModelForCausalLM.from_pretrained(options.first, adapter_name="first").to(infer_device()).eval()
    model.load_adapter(options.second, "second")
    tokenizer = AutoTokenizer.from_pretrained(model.peft_config["first"].base_model_name_or_path)

    def show(title: str, count: int = 1, **kwargs) -> None:
        chat = [{"role": "user", "content": options.prompt}]
        inputs = tokenizer.apply_chat_template(
            [chat] * count, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        with torch.no_grad():
            output = model.generate(
                **inputs, **kwargs, max_new_tokens=options.max_new_tokens, do_sample=False, repetition_penalty=1.1
            )
        print(f"\n--- {title}")
        for row in output[:, inputs["input_ids"].shape[1] :]:
            print("*", tokenizer.decode(row, skip_special_tokens=True))

    show("one adapter per row: first, none, second", 3, adapter_names=["first", "__base__", "second"])
    model.base_model.set_adapter(["first", "second"])
    with steering(model, 0.5, "second"):
        show("both at once, the second at multiplier 0.5")
    model.add_weighted_adapter(["first", "second"], [1.0, -0.5], "combined", combination_type="linear")
    model.set_adapter("combined")
    show("combined into one code: the first minus half of the second")


if __name__ == "__main__":
    main()
