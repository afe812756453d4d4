"""What steering does to knowledge: tasks of lm-eval at several multipliers.

python examples/lm_eval_tasks.py out/demo/adapter                           # 120 questions of this project, offline
python examples/lm_eval_tasks.py polite-gemma --tasks mmlu --num-fewshot 5  # any task of lm-eval

`yapo eval` is the same as a command.
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
    parser.add_argument("adapter", help="folder or Hub name of an adapter")
    parser.add_argument("--tasks", nargs="+", help="tasks of lm-eval; questions of this project if missing")
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
    """A task of one's own, as lm-eval takes it: the questions of the study."""
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
