"""The study of docs/study.md: every method on every behaviour, measured alike.

    python examples/study/run.py --data DATA --out out/study

What is done is kept in --out, and a run that was stopped goes on there. README.md beside this file says what --data
holds; `--config examples/study/quick.yaml` needs none and takes minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

# One bar for the study; those of its parts would drown it.
os.environ.setdefault("TQDM_DISABLE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets
import yaml
from cells import Bench, Method, candidates, write_json
from report import write_report
from sources import Behaviour, load_behaviour, load_culture, load_facts
from tqdm.auto import tqdm

HERE = Path(__file__).parent
_SCORE = "validation.json"


class Study:
    """All cells, in the order in which a part of them makes the most of a report: seed after seed."""

    def __init__(self, config: dict[str, Any], data: Path, out: Path, only: list[str]) -> None:
        self.config, self.data, self.out, self.only = config, data, out, only
        self.bench = Bench(config, data, out)
        sizes = config["pairs"]
        self.behaviours = {
            name: load_behaviour(name, entry, sizes, data) for name, entry in config["behaviours"].items()
        }
        self.facts = load_facts(config["knowledge"]["questions"])
        self.methods: dict[str, Method] = {}

    def run(self) -> None:
        """Makes and measures what is not there yet."""
        if not self.is_wanted("tuning") and not (self.out / "tuning.json").is_file():
            raise SystemExit(f"{self.out} has no tuned settings yet: let one process finish --only tuning first.")
        self.tune()
        first, *others = self.config["seeds"]
        wanted = [behaviour for name, behaviour in self.behaviours.items() if self.is_wanted(name)]
        self.measure_all([(behaviour, method, first) for behaviour in wanted for method in self.methods.values()])
        if "culture" in self.config and self.is_wanted("culture"):
            self.culture()
        write_report(self)
        again = [method for method in self.methods.values() if method.is_random]
        self.measure_all([(b, method, seed) for seed in others for b in wanted for method in again])

    def is_wanted(self, part: str) -> bool:
        """Whether this process is to do a behaviour, or "culture"."""
        return not self.only or part in self.only

    def measure_all(self, cells: list[tuple[Behaviour, Method, int]]) -> None:
        """Makes and measures cells."""
        with tqdm(cells, unit="cell", disable=False) as bar:
            for behaviour, method, seed in bar:
                bar.set_postfix_str(f"{behaviour.name}, {method.name}, seed {seed}")
                self.measure(behaviour, method, seed)

    def tune(self, make: bool = True) -> None:
        """Chooses the settings of each method on validation pairs.

        Args:
            make: Whether to make and score what is not there yet; otherwise methods are left out of which nothing is.
        """
        behaviour, seed = self.behaviours[self.config["tune_on"]], self.config["seeds"][0]
        tuned: dict[str, dict[str, float]] = {}
        for name, entry in self.config["methods"].items():
            found = candidates(name, entry)
            if len(found) > 1:
                tuned[name] = {}
                if not make:
                    found = [m for m in found if (self.bench.folder(behaviour.name, m, seed) / _SCORE).is_file()]
                for method in found:
                    started = time.monotonic()
                    tuned[name][method.setting] = self.score(behaviour, method, seed)
                    seconds = time.monotonic() - started
                    print(f"{name}, {method.setting}: {tuned[name][method.setting]:.4f}, {seconds:.0f} s", flush=True)
                found.sort(key=lambda method: -tuned[name][method.setting])
            if found:
                self.methods[name] = found[0]
        if make:
            write_json(self.out / "tuning.json", tuned)

    def score(self, behaviour: Behaviour, method: Method, seed: int) -> float:
        """The gain of a setting on validation pairs, at the damage that all methods are calibrated to."""
        folder = self.bench.make(behaviour, method, seed)
        file = folder / _SCORE
        if not file.is_file():
            write_json(file, self.bench.score(behaviour, folder))
        return json.loads(file.read_text())

    def make(self, behaviour: Behaviour, method: Method, seed: int) -> Path:
        """Makes a cell, and before it the one that it is made of."""
        like = None
        if method.of is not None:
            if method.of not in self.methods:
                raise SystemExit(f"{method.name} is made of {method.of!r}: list that method before it.")
            other = self.methods[method.of]
            like = self.make(behaviour, other, seed if other.is_random else self.config["seeds"][0])
        return self.bench.make(behaviour, method, seed, like)

    def measure(self, behaviour: Behaviour, method: Method, seed: int) -> None:
        """Makes a cell, and measures it."""
        folder = self.make(behaviour, method, seed)
        self.bench.effect(behaviour, folder, method)
        self.bench.harm(folder, method)
        if seed == self.config["seeds"][0]:
            base, prompt = self.out / "knowledge-base.json", behaviour.prompts[1]
            self.bench.choices("knowledge.json", folder, method, self.facts, chat=False, base=base, prompt=prompt)

    def culture(self) -> None:
        """Trains on each country's pairs, and asks its test questions."""
        entry, seed = self.config["culture"], self.config["seeds"][0]
        for country, file in entry["files"].items():
            found = load_culture(country, self.data / file, entry["questions"], entry["prompt"], self.config["pairs"])
            for name in entry["methods"]:
                method = self.methods[name]
                folder = self.make(found.behaviour, method, seed)
                for status, questions in found.questions.items():
                    base, prompt = folder.parents[2] / f"{status}-base.json", found.behaviour.prompts[1]
                    self.bench.choices(f"{status}.json", folder, method, questions, chat=True, base=base, prompt=prompt)
                print(f"Culture of {country}: {name} is done.", flush=True)


def main() -> None:
    """Runs the study, and writes its report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "study.yaml")
    parser.add_argument("--data", type=Path, default=HERE, help="folder of the files that the config names")
    parser.add_argument("--out", type=Path, default=Path("out/study"), help="folder of the results")
    only = "'tuning', behaviours, or 'culture'; the others are left to other processes, with the same --out"
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help=only)
    parser.add_argument("--report", action="store_true", help="only write the report of what is there")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*pairs are left out")
    datasets.disable_progress_bars()
    config = yaml.safe_load(options.config.read_text())
    options.out.mkdir(parents=True, exist_ok=True)
    same_config(config, options.out / "config.json")
    parts = ["tuning", *config["behaviours"], *(["culture"] if "culture" in config else [])]
    unknown = [part for part in options.only if part not in parts]
    if unknown:
        parser.error(f"--only {unknown[0]}: the config has {', '.join(parts)}")
    study = Study(config, options.data, options.out, options.only)
    if options.report:
        study.tune(make=False)
    elif options.only == ["tuning"]:
        return study.tune()
    else:
        study.run()
    print(write_report(study))


def same_config(config: dict[str, Any], kept: Path) -> None:
    """Refuses to go on with results of another config."""
    if not kept.is_file():
        write_json(kept, config)
    elif json.loads(kept.read_text()) != json.loads(json.dumps(config)):
        raise SystemExit(f"{kept.parent} holds results of another config ({kept}): give another --out.")


if __name__ == "__main__":
    main()
