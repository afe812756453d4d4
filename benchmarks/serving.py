"""The cost of steering in vLLM: tokens per second of steered relative to unsteered requests, at several batch sizes.

python benchmarks/serving.py --out serving.json        (requires vLLM, such as in .venv-vllm of make test-vllm)

One engine serves the embedded model. Every round generates the same batch unsteered, with an adapter of 64 features,
with one of half of the SAE's features, with the latter at a different multiplier per request, and with a dense vector.
Ratios are those of the medians over rounds. Then transformers scores vLLM's greedy answers to prompts of the embedded
preference sets, at several multipliers in one batch: how far the log-probabilities of their tokens are apart, and how
often transformers would have chosen the same token.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))


def save_adapters(folder: Path, features: dict[str, int]) -> dict[str, str]:
    """Saves adapters with random codes of both signs for the embedded SAE, and one with a dense vector."""
    import torch
    from embedded import load_model_and_tokenizer, sae_folder, sae_layer
    from peft import get_peft_model

    from yapo_peft import YaPOConfig
    from yapo_peft.tuner.adapters import steered_layers

    torch.manual_seed(0)
    base, _ = load_model_and_tokenizer()
    folders = {}
    for name, count in features.items():
        space = {"space": "dense"} if name == "dense" else {"sae_path": sae_folder()}
        model = get_peft_model(base, YaPOConfig(layers=sae_layer(), **space))
        code = steered_layers(model)[0].yapo_code["default"]
        code.data[torch.randperm(len(code))[:count]] = 0.01 * torch.randn(min(count, len(code)))
        model.save_pretrained(str(folder / name))
        folders[name] = str(folder / name)
        base = model.unload()
    return folders


def main() -> None:
    """Prints the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=32, help="tokens to generate per request")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.batches, options.tokens, options.rounds = [1, 4], 8, 1
    features = {"few": 64, "many": 2304, "dense": 10**6}
    with tempfile.TemporaryDirectory() as folder:
        adapters = save_adapters(Path(folder), features)
        os.environ["YAPO_ADAPTERS"] = ",".join(f"{name}={source}" for name, source in adapters.items())
        os.environ["YAPO_MAX_ADAPTERS"] = str(len(adapters))
        llm = engine(options)
        results = {"serving": measure(llm, options), "exactness": exactness(llm, adapters, options)}
    print(json.dumps(results, indent=2))
    if options.out:
        options.out.write_text(json.dumps(results))


def engine(options: argparse.Namespace) -> Any:
    """A vLLM engine with the embedded model in float32."""
    from embedded import model_folder
    from vllm import LLM

    return LLM(
        str(model_folder()), dtype="float32", max_model_len=512, max_num_seqs=max(options.batches),
        gpu_memory_utilization=0.2, enable_prefix_caching=False, disable_log_stats=True,
    )  # fmt: skip


def measure(llm: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second by batch size, and their ratios to unsteered requests."""
    from vllm import SamplingParams

    draw = random.Random(0)
    sides = {
        "unsteered": lambda place: None,
        "64 features": lambda place: "few=1",
        "2304 features": lambda place: "many=1",
        "2304 features, one multiplier per request": lambda place: f"many={draw.uniform(-2, 2)}",
        "dense": lambda place: "dense=1",
    }
    results: dict[str, Any] = {}
    for batch in options.batches:
        prompts = [{"prompt_token_ids": [draw.randrange(1000, 20000) for _ in range(32)]} for _ in range(batch)]
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for round_ in range(options.rounds + 1):
            names = list(sides)
            draw.shuffle(names)
            for name in names:
                requested = [sides[name](place) for place in range(batch)]
                settings = [
                    SamplingParams(
                        temperature=0, max_tokens=options.tokens, ignore_eos=True, detokenize=False,
                        extra_args=None if adapter is None else {"yapo": adapter},
                    )
                    for adapter in requested
                ]  # fmt: skip
                started = time.perf_counter()
                llm.generate(prompts, settings, use_tqdm=False)
                if round_:  # the first round is a warm-up
                    seconds[name].append(time.perf_counter() - started)
        speed = {name: batch * options.tokens / statistics.median(times) for name, times in seconds.items()}
        results[f"batch {batch}"] = {
            "tokens per second": {name: round(value, 1) for name, value in speed.items()},
            "relative to unsteered": {name: round(value / speed["unsteered"], 3) for name, value in speed.items()},
        }
    return results


def exactness(llm: Any, adapters: dict[str, str], options: argparse.Namespace) -> dict[str, Any]:
    """Compares vLLM's log-probabilities of its own greedy answers with those of transformers."""
    import torch
    from embedded import load_model_and_tokenizer, preferences
    from peft import PeftModel
    from vllm import SamplingParams

    from yapo_peft import steering

    base, tokenizer = load_model_and_tokenizer()
    rows = [row for name in ("enthusiasm", "caution") for row in preferences(name, "test").select(range(10))]
    prompts = [tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"] for row in rows]
    cases = [
        (prompt, name, multiplier)
        for prompt in prompts[:: 10 if options.quick else 1]
        for name in adapters
        for multiplier in (-2.0, -1.0, 0.0, 0.5, 1.0)
    ]
    settings = [
        SamplingParams(temperature=0, max_tokens=32, logprobs=0, extra_args={"yapo": f"{name}={multiplier}"})
        for _, name, multiplier in cases
    ]
    outputs = llm.generate([{"prompt_token_ids": case[0]} for case in cases], settings, use_tqdm=False)
    (first, source), *others = adapters.items()
    model = PeftModel.from_pretrained(base, source, first).eval()
    for name, source in others:
        model.load_adapter(source, name)
    largest, same, count = 0.0, 0, 0
    for (prompt, name, multiplier), output in zip(cases, outputs, strict=True):
        answer = list(output.outputs[0].token_ids)
        with torch.no_grad(), steering(model, multiplier, name):
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)
        steps = zip(answer, output.outputs[0].logprobs, strict=True)
        log_probs = torch.tensor([step[token].logprob for token, step in steps])
        largest = max(largest, float((expected[range(len(answer)), answer] - log_probs).abs().max()))
        same += int((expected.argmax(-1) == torch.tensor(answer)).sum())
        count += len(answer)
    return {"requests": len(cases), "tokens": count, "same token": same, "largest difference (nats)": largest}


if __name__ == "__main__":
    main()
