"""Measures what steering does to knowledge: lm-eval tasks at several multipliers.

python examples/lm_eval_tasks.py out/demo/adapter                           # 120 bundled questions, offline
python examples/lm_eval_tasks.py polite-gemma --tasks mmlu --num-fewshot 5  # any lm-eval task

`yapo eval` does the same from the command line.
"""

from __future__ import annotations

import argparse
from typing import Any

from peft import AutoPeftModelForCausalLM
from peft.utils import infer_device
from study.sources import load_facts
from transformers import AutoTokenizer

import yapo_peft  # noqa: F401  registers the method, before PEFT reads the adapter
from yapo_peft.evaluation import sweep_tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="folder or Hub id of an adapter")
    parser.add_argument("--tasks", nargs="+", help="lm-eval tasks; defaults to the bundled questions")
    parser.add_argument("--multipliers", nargs="+", type=float, default=[0.0, 0.5, 1.0])
    parser.add_argument("--num-fewshot", type=int)
    parser.add_argument("--limit", type=float, help="documents per task")
    options = parser.parse_args()
    model = AutoPeftModelForCausalLM.from_pretrained(options.adapter).to(infer_device()).eval()
    tokenizer = AutoTokenizer.from_pretrained(model.peft_config["default"].base_model_name_or_path)
    scores = sweep_tasks(
        model,
        tokenizer,
        options.tasks or [facts_task()],
        options.multipliers,
        metric="acc",
        num_fewshot=options.num_fewshot,
        limit=options.limit,
    )
    print(scores.summary().to_string(index=False))


def facts_task() -> dict[str, Any]:
    """A custom lm-eval task with the study's questions."""
    return {
        "task": "facts",
        "custom_dataset": lambda **_: {"test": load_facts(120)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "options",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


if __name__ == "__main__":
    main()
