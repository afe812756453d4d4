"""The paper's cultural alignment (arXiv 2601.08441): each method in each country, measured at its published multiplier.

    python examples/paper/run.py --config examples/paper/gemma-2-2b.yaml --out out/paper

An interrupted run continues with the same command. README.md beside this file describes the config and the results.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# One bar for all; those of its parts would drown it.
os.environ.setdefault("TQDM_DISABLE", "1")
sys.path.insert(1, str(Path(__file__).parents[1]))
sys.path.insert(2, str(Path(__file__).parents[1] / "study"))

import datasets
import pandas as pd
from cells import Bench, kept, write_json
from lm_eval_tasks import facts_task
from protocol import UNSTEERED, Country, Method, choice_measure, load_countries, read_config
from tables import write_tables
from tqdm.auto import tqdm

from yapo_peft import ConfigError, YaPOTrainer, YaPOTrainingConfig, sweep
from yapo_peft._utils import begin_or_resume, partial_of, replacing
from yapo_peft.data import generate_rejected
from yapo_peft.errors import YaPOError
from yapo_peft.evaluation import RUBRICS, Judge, Repetition, Scores, sweep_tasks
from yapo_peft.evaluation.lm_eval import task_manager
from yapo_peft.methods import fit_caa, fit_sas, measure_contrast


@dataclass(frozen=True)
class Cell:
    """One method in one country with one seed, and the folder of its adapter and measurements."""

    country: Country
    method: Method
    seed: int
    folder: Path


class Protocol:
    """The cells of a config, made and measured.

    Args:
        config: As `read_config` returns it.
        methods: As `read_config` returns them.
        folder: What the paths of its data are relative to.
        out: Folder of the results.

    Raises:
        ConfigError: A training option or a task is not known.
        DatasetError: As `load_countries`.
    """

    def __init__(self, config: dict[str, Any], methods: list[Method], folder: Path, out: Path) -> None:
        self.config, self.methods, self.out = config, methods, out
        for method in filter(lambda method: method.is_trained, methods):
            self._arguments(method, seed=0, folder=str(out))  # raises before any work
        self.tasks, self._task_manager = self._tasks()
        self.countries = load_countries(config, folder)
        self.bench = Bench(config, folder, out)
        self._current: tuple[Path | None, Any] = (None, None)

    def cells(self) -> Iterator[Cell]:
        """All cells, seed by seed; with other seeds only those that depend on them."""
        first = self.config["seeds"][0]
        for seed in self.config["seeds"]:
            for country in self.countries:
                for method in (UNSTEERED, *self.methods):
                    if seed == first or method.is_trained:
                        place = "".join(c if c.isalnum() else "-" for c in country.name)
                        yield Cell(country, method, seed, self.out / place / method.name / f"seed-{seed}")

    def run(self) -> None:
        """Makes and measures what is not there yet."""
        with tqdm(list(self.cells()), unit="cell", disable=False) as bar:
            for cell in bar:
                bar.set_postfix_str(f"{cell.country.name}, {cell.method.name}, seed {cell.seed}")
                self.measure(cell)

    def measure(self, cell: Cell) -> None:
        """Makes a cell's adapter, and measures it at the method's multipliers."""
        self.make(cell)
        for kind, questions in cell.country.questions.items():
            kept(cell.folder / f"{kind}.json", lambda questions=questions: self._choices(cell, questions))
        if cell.country.prompts is not None:
            self.answer(cell)
        if self.config.get("judge"):
            kept(cell.folder / "judge.json", lambda: self._judged(cell))
        if self.tasks:
            kept(self.knowledge_file(cell), lambda: self._knowledge(cell))

    def knowledge_file(self, cell: Cell) -> Path:
        """Where a cell's knowledge is kept; the unsteered model's is the same in all countries."""
        return (self.out if cell.method == UNSTEERED else cell.folder) / "knowledge.json"

    def make(self, cell: Cell) -> None:
        """Trains or fits a cell's adapter, unless it is there."""
        cell.folder.mkdir(parents=True, exist_ok=True)
        if cell.method == UNSTEERED or (cell.folder / "adapter").is_dir():
            return
        self._current = (None, None)
        pairs = self._pairs(cell.country)
        model, tokenizer = self.bench.attached(cell.method.space)
        if cell.method.is_trained:
            with tempfile.TemporaryDirectory() as folder:
                args = self._arguments(cell.method, cell.seed, folder)
                trainer = YaPOTrainer(model, args, train_dataset=pairs, processing_class=tokenizer)
                trainer.train()
            write_json(cell.folder / "log.json", trainer.state.log_history)
        else:
            contrast = measure_contrast(model, pairs, tokenizer, batch_size=self._batch_size)
            if cell.method.name == "caa":
                fit_caa(model, contrast)
            else:
                fit_sas(model, contrast, tau=cell.method.tau)
        partial = partial_of(cell.folder / "adapter")
        model.save_pretrained(partial)
        partial.rename(cell.folder / "adapter")

    def answer(self, cell: Cell) -> list[dict[str, Any]]:
        """The answers to open-ended questions, a row per answer, which are generated if they are not there."""
        file = cell.folder / "answers.jsonl"
        if not file.is_file():
            model, tokenizer = self._steered(cell)
            prompts = cell.country.prompts
            found = sweep(
                model,
                prompts,
                tokenizer,
                cell.method.multipliers,
                measure=Repetition(),
                batch_size=self._batch_size,
                max_new_tokens=self._max_new_tokens,
            )
            shared = {"country": cell.country.name, "method": cell.method.name, "seed": cell.seed}
            rows = [shared | row | prompts[row["example"]] for row in found.table.to_dict("records")]
            with replacing(file) as partial:
                partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
        return [json.loads(line) for line in file.read_text("utf-8").splitlines()]

    def _choices(self, cell: Cell, questions: datasets.Dataset) -> Scores:
        model, tokenizer = self._steered(cell)
        measure = choice_measure(questions)
        options = {"max_new_tokens": self._max_new_tokens} if hasattr(measure, "score_answers") else {}
        multipliers, size = cell.method.multipliers, self._batch_size
        return sweep(model, questions, tokenizer, multipliers, measure=measure, batch_size=size, **options)

    def _judged(self, cell: Cell) -> Scores:
        """The judge's scores of the answers: how well they fit the country, whether or not the question names it."""
        from huggingface_hub import InferenceClient

        judge = self.config["judge"]
        client = InferenceClient(base_url=judge["url"], api_key=os.environ.get("JUDGE_API_KEY", "none"))
        shows = f"fits the everyday life, customs and values of {cell.country.name}"
        cache = self.out / "judge-cache.jsonl"
        measure = Judge(client, shows, RUBRICS["culture"][1], model=judge.get("model"), cache=cache)
        rows = self.answer(cell)
        scores = measure.score_answers(rows, range(len(rows)), [row["answer"] for row in rows])
        table = [{name: row[name] for name in ("multiplier", "example")} for row in rows]
        return Scores(pd.DataFrame([row | score for row, score in zip(table, scores, strict=True)]), ("score",))

    def _knowledge(self, cell: Cell) -> Scores:
        model, tokenizer = self._steered(cell)
        options = {name: value for name, value in self.config["knowledge"].items() if name != "tasks"}
        options = {"batch_size": self._batch_size, "task_manager": self._task_manager, **options}
        return sweep_tasks(model, tokenizer, self.tasks, cell.method.multipliers, metric="acc", **options)

    def _tasks(self) -> tuple[list[Any], Any]:
        """The tasks of lm-eval, and its task manager; "facts" is the task of examples/lm_eval_tasks.py."""
        tasks = (self.config.get("knowledge") or {}).get("tasks") or []
        if not tasks:
            return [], None
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        known = {*inspect.signature(simple_evaluate).parameters, "tasks"}
        strange = sorted(set(self.config["knowledge"]) - known)
        if strange:
            raise ConfigError(
                f"knowledge has {strange[0]!r}, which is not an option of lm_eval.simple_evaluate: drop it."
            )
        named = set(tasks) - {"facts"}
        # Reading lm-eval's own tasks takes a while.
        manager = task_manager() if named else TaskManager(include_defaults=False)
        unknown = sorted(named - set(manager.all_tasks))
        if unknown:
            raise ConfigError(
                f"knowledge: lm-eval has no task {unknown[0]!r}: use its names, such as 'mmlu', or 'facts'."
            )
        return [facts_task() if task == "facts" else task for task in tasks], manager

    def _steered(self, cell: Cell) -> tuple[Any, Any]:
        """The model with a cell's adapter, and the tokenizer."""
        if self._current[0] != cell.folder:
            found = self.bench.attached() if cell.method == UNSTEERED else self.bench.saved(cell.folder)
            self._current = (cell.folder, found)
        return self._current[1]

    def _pairs(self, country: Country) -> datasets.Dataset:
        if "rejected" in country.pairs.column_names:
            return country.pairs
        # A new adapter, which is zero: the model as it is.
        model, tokenizer = self.bench.attached()
        folder = self.out / "rejected" / country.name
        options = {"max_new_tokens": self._max_new_tokens, "batch_size": self._batch_size}
        options |= self.config["data"].get("generation") or {}
        return generate_rejected(model, tokenizer, country.pairs, folder, **options)

    def _arguments(self, method: Method, seed: int, folder: str) -> YaPOTrainingConfig:
        options: dict[str, Any] = {
            "cache_activations": True,
            "activation_cache_dir": str(self.out / "activations"),
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            **(self.config.get("training") or {}),
            **method.training,
        }
        try:
            return YaPOTrainingConfig.published(output_dir=folder, seed=seed, **options)
        except TypeError as error:
            raise ConfigError(f"{method.name}: training has an option that is not known ({error}).") from error

    @property
    def _batch_size(self) -> int:
        return self.config.get("batch_size") or 8

    @property
    def _max_new_tokens(self) -> int:
        return self.config.get("max_new_tokens") or 256


def main() -> None:
    """Runs the protocol, and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a YAML file, such as gemma-2-2b.yaml beside this")
    parser.add_argument("--out", type=Path, default=Path("out/paper"), help="folder of the results")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*pairs are left out")
    datasets.disable_progress_bars()
    try:
        config, methods = read_config(options.config)
        protocol = Protocol(config, methods, options.config.parent, options.out)
        begin_or_resume(options.out / "config.json", config)
    except (YaPOError, OSError, ImportError) as error:
        raise SystemExit(f"{options.config}: {error}") from error
    protocol.run()
    print(write_tables(protocol).read_text())


if __name__ == "__main__":
    main()
