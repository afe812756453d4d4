"""Runs the snippets of the pages, as written, on tiny models under the names of the real ones.

A process of its own, started by test_snippets.py with a local Hub: huggingface_hub reads its settings on import. Writes
what failed of each page to a JSON file.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import sys
import time
import traceback
import types
from pathlib import Path

import datasets
import torch
from datasets import Dataset, DatasetDict, load_dataset
from peft import PeftModel, get_peft_model
from tiny import D_MODEL, inference_sae, make_model, make_sae, preference_rows, random_code, random_ids, set_code
from transformers import AutoTokenizer

import yapo_peft
from yapo_cli import main as yapo
from yapo_peft.data import contrast
from yapo_peft.sae_training import SAETrainingConfig
from yapo_peft.scoring import neutral

ROOT = Path(__file__).parents[2]
LAYER, DEPTH = 15, 17
FENCE = re.compile(r"^```(python|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Commands that set up machines, or start what is tested elsewhere.
NOT_RUN = ("make ", "pip install", "python -m", "accelerate launch", "bash ", "yapo --install-completion")


def main(pages: list[str], tokenizer: str, out: str) -> None:
    """Runs pages in folders of their own."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    for name, architecture in MODELS.items():
        make_model(architecture, depth=DEPTH).push_to_hub(name)
        tokenizer.push_to_hub(name)
    stand_ins(tokenizer)
    failed: dict[str, list[str]] = {}
    start = Path.cwd()
    for page in pages:
        folder = start / page.replace("/", "-")
        folder.mkdir()
        os.chdir(folder)
        began = time.monotonic()
        failed[page] = run(ROOT / page, furnish(tokenizer))
        print(f"{page}: {time.monotonic() - began:.1f} s")
        os.chdir(start)
        shutil.rmtree(folder)
        Path(out).write_text(json.dumps(failed))


MODELS = {
    "google/gemma-2-2b-it": "gemma2",
    "google/gemma-3-1b-it": "gemma3",
    "meta-llama/Llama-3.1-8B-Instruct": "llama",
    "Qwen/Qwen3-1.7B": "qwen3",
    "my-org/my-model": "gemma2",
    "my-org/my-gemma": "gemma2",
}


def run(page: Path, names: dict) -> list[str]:
    """What failed of a page; what comes after a failure is run all the same."""
    failed = []
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        line = text[: match.start()].count("\n") + 2
        try:
            if match[1] == "python":
                # Lines as in the file, so that a traceback says where.
                exec(compile("\n" * (line - 1) + match[2], str(page), "exec"), names)
            else:
                for command in commands(match[2]):
                    shell(command)
        except BaseException:
            failed.append(f"{page.name}:{line}\n{traceback.format_exc()[-2500:]}")
    return failed


def commands(block: str) -> list[str]:
    """The commands of a shell snippet, without comments, a continued one on one line."""
    lines = re.sub(r"\\\n\s*", " ", block).splitlines()
    return [command for line in lines if (command := re.sub(r"(^|\s)#.*", "", line).strip())]


def shell(command: str) -> None:
    if command.startswith(NOT_RUN):
        return
    program, *arguments = shlex.split(command)
    if program != "yapo":
        raise RuntimeError(f"{command!r} is no command that is run here, or known not to be.")
    status = yapo(arguments)
    if status:
        raise RuntimeError(f"{command!r} ended with status {status}.")


def furnish(tokenizer) -> dict:
    """Files of the working directory, and names, that pages take for granted."""
    torch.manual_seed(0)
    rows = preference_rows(8)
    pairs = Dataset.from_list(rows)
    plain = [{name: row[name][-1]["content"] for name in row} for row in rows]
    for file in ("pairs.csv", "test.csv", "power-seeking.csv"):
        columns = {"prompt": "question", "chosen": "matching", "rejected": "not_matching"}
        table = [{**{new: row[old] for old, new in columns.items()}, **row} for row in plain]
        Dataset.from_list(table).to_csv(file)
    questions = [
        {
            "question": f"w{i} w2", "options": ["w3", "w4 w5"], "answer_index": i % 2,
            "country": "UK", "localization_status": "localized" if i < 4 else "nonlocalized", "split": "test",
        }
        for i in range(8)
    ]  # fmt: skip
    Path("culture.jsonl").write_text("\n".join(map(json.dumps, questions)))
    Path("answers.jsonl").write_text(
        "\n".join(json.dumps({"prompt": row["prompt"], "chosen": row["chosen"]}) for row in plain)
    )
    Dataset.from_list(rows).to_json("data/train.jsonl")
    config = {
        "model_name_or_path": "google/gemma-2-2b-it", "dataset_name": "data", "max_steps": 1, "report_to": "none",
        "bf16": False, "eval_strategy": "no",
    }  # fmt: skip
    Path("dpo.yaml").write_text(json.dumps(config))
    Path("sample.txt").write_text("w1 w2 w3 w4\n\nw5 w6 w7 w8 " * 50)
    Path("wiki.txt").write_text(" ".join(f"w{i * i % 97}" for i in range(9000)))
    Path("chats.jsonl").write_text(json.dumps({"messages": rows[0]["prompt"] + rows[0]["chosen"]}))
    sae = make_sae(d_in=D_MODEL, d_sae=D_MODEL, layer=LAYER)
    inference_sae(sae, Path("folder/of/the/sae"))
    inference_sae(make_sae(d_in=D_MODEL, d_sae=D_MODEL, layer=14), Path("path/of/the/sae"))
    torch.save(torch.randn(D_MODEL), "vec_ep20_layer15.pt")
    (Path("examples") / "assets").mkdir(parents=True)
    shutil.copytree(ROOT / "examples" / "assets" / "preferences", "examples/assets/preferences")

    base = make_model("gemma2", depth=DEPTH)
    base.name_or_path = "google/gemma-2-2b-it"
    yapo_peft.register_sae(sae)
    adapters = ("polite", "brief", "adapter", "my-adapter", "another-adapter", "polite-gemma", "out/demo/adapter")
    for seed, name in enumerate(adapters):
        save(name, sae, seed)
    model = PeftModel.from_pretrained(make_model("gemma2", depth=DEPTH), "polite", adapter_name="polite")
    model.get_base_model().name_or_path = "google/gemma-2-2b-it"
    model.add_adapter("bipo", yapo_peft.YaPOConfig(layers=LAYER, space="dense"))
    set_code(model, random_code(scale=10.0), "bipo")
    model.eval()
    topk_model = get_peft_model(
        make_model("gemma2", depth=DEPTH), yapo_peft.YaPOConfig(layers=LAYER, sae=make_sae("topk"))
    )
    set_code(topk_model, random_code())
    args = yapo_peft.YaPOTrainingConfig(output_dir="out", max_steps=1, bf16=False, report_to="none")
    trainer = yapo_peft.YaPOTrainer(
        PeftModel.from_pretrained(make_model("gemma2", depth=DEPTH), "polite", is_trainable=True),
        yapo_peft.YaPOTrainingConfig(output_dir="trained", hub_model_id="tester/trained", max_steps=1, bf16=False),
        train_dataset=pairs,
        processing_class=tokenizer,
    )
    inputs = tokenizer("w1 w2 w3", return_tensors="pt")
    names = {name: getattr(yapo_peft, name) for name in yapo_peft.__all__}
    from yapo_peft import evaluation

    names |= {name: getattr(evaluation, name) for name in evaluation.__all__}
    return names | {
        "__name__": "page", "yapo_peft": yapo_peft, "PeftModel": PeftModel, "get_peft_model": get_peft_model,
        "base": base, "model": model, "tokenizer": tokenizer, "sae": sae, "args": args, "trainer": trainer,
        "topk_model": topk_model.eval(), "pairs": pairs, "held_out": pairs, "held_out_pairs": pairs, "prompts": pairs,
        "texts": ["w1 w2 w3 w4 w5 " * 1200] * 2, "inputs": inputs, "ids": random_ids(3),
        "three_rows": tokenizer(["w1 w2"] * 3, return_tensors="pt"),
    }  # fmt: skip


def save(name: str, sae, seed: int) -> None:
    model = get_peft_model(
        make_model("gemma2", depth=DEPTH), yapo_peft.YaPOConfig(layers=LAYER, sae=sae, task_type="CAUSAL_LM")
    )
    set_code(model, random_code(d_sae=D_MODEL, seed=seed))
    model.peft_config["default"].base_model_name_or_path = "google/gemma-2-2b-it"
    with contextlib.redirect_stdout(sys.stderr):
        model.save_pretrained(name)


def stand_ins(tokenizer) -> None:
    """What is too large, or somewhere else: SAEs of releases, datasets of the Hub, servers, and the launcher."""
    import accelerate.commands.launch
    import gradio
    import huggingface_hub
    import sae_lens
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    def from_pretrained(release, sae_id, device="cpu"):
        assert sae_id in get_pretrained_saes_directory()[release].saes_map, (release, sae_id)
        layer = re.search(r"layer_?(\d+)|^l(\d+)r", sae_id)
        index = int(layer[1] or layer[2])
        return make_sae(d_in=D_MODEL, d_sae=D_MODEL, layer=index, seed=index)

    sae_lens.SAE.from_pretrained = from_pretrained
    real = load_dataset

    def load(path, *arguments, split=None, **options):
        if path == "cais/mmlu":
            row = {"question": "w1", "choices": ["w2", "w3", "w4", "w5"], "answer": 1, "subject": "w6"}
            rows = {"test": 1, "validation": 1, "dev": 5}
            return DatasetDict({name: Dataset.from_list([row] * count) for name, count in rows.items()})
        if path.count("/") == 1 and not Path(path).exists():
            return Dataset.from_list(preference_rows(8))
        return real(path, *arguments, split=split, **options)

    datasets.load_dataset = load

    embedded = types.ModuleType("embedded")
    embedded.load_model_and_tokenizer = lambda: (make_model("llama", depth=DEPTH), tokenizer)
    embedded.preferences = lambda *_: Dataset.from_list(preference_rows(8))
    embedded.sae_folder = lambda: "path/of/the/sae"
    embedded.sae_layer = lambda: 14
    sys.modules["embedded"] = embedded

    def judged(self, messages, **_):
        message = types.SimpleNamespace(content="Score: 3")
        return types.SimpleNamespace(choices=[types.SimpleNamespace(message=message)], usage=None)

    huggingface_hub.InferenceClient.chat_completion = judged
    gradio.Blocks.launch = lambda self, **_: (None, "http://127.0.0.1:7860/", None)
    gradio.Blocks.block_thread = lambda self: None

    def in_this_process(launched):
        from yapo_peft.scripts.yapo import main as train
        from yapo_peft.scripts.yapo import parse

        train(*parse(launched.training_script_args)[0])

    accelerate.commands.launch.launch_command = in_this_process

    def briefly(self, *arguments, **options):
        self.args.max_steps = 2
        return real_train(self, *arguments, **options)

    def small(self):
        real_check(self)
        self.tokens, self.batch_size, self.buffer, self.d_sae, self.l0 = 128, 64, 1024, self.d_sae and 64, 8

    real_check = SAETrainingConfig.__post_init__
    SAETrainingConfig.__post_init__ = small

    # Trainings and calibrations read it all.
    few, questions = neutral.packaged_text()[:8], contrast.packaged_questions()[:12]
    neutral.packaged_text, contrast.packaged_questions = lambda: few, lambda: questions
    # Random models say the same in every manner.
    real_answers, contrast.are_alike = contrast.answer_all, lambda *_: False
    contrast.answer_all = lambda *arguments, **options: [
        {**found, "answer": f"w{place} {found['answer']}"}
        for place, found in enumerate(real_answers(*arguments, **options))
    ]
    real_train = yapo_peft.YaPOTrainer.train
    yapo_peft.YaPOTrainer.train = briefly


if __name__ == "__main__":
    main(sys.argv[3:], sys.argv[1], sys.argv[2])
