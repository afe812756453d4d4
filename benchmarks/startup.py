"""What it costs to start: importing the package beside PEFT, and `yapo --help` beside a command that does nothing.

python benchmarks/startup.py

CPU seconds, user and system, of fresh processes in turn; the least of each, which noise only adds to.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys

SMALLEST = """
import typer
app = typer.Typer()
@app.command()
def nothing() -> None: ...
app(["--help"])
"""
SIDES = {
    "import peft": "import peft",
    "import yapo_peft": "import yapo_peft",
    "a typer command that does nothing, --help": SMALLEST,
    "yapo --help": "from yapo_cli import main; main(['--help'])",
}
RATIOS = (("import yapo_peft", "import peft"), ("yapo --help", "a typer command that does nothing, --help"))
EXTRAS = {
    "matplotlib ([plots], [report])": "matplotlib.figure",
    "gradio ([app])": "gradio",
    "lm-eval ([eval])": "lm_eval.evaluator, lm_eval.models.huggingface",
}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round without the extras, to see that it runs")
    options = parser.parse_args()
    rounds, extras = (1, {}) if options.quick else (options.rounds, EXTRAS)
    sides = SIDES | {name: f"import yapo_peft, {modules}" for name, modules in extras.items()}
    least = dict.fromkeys(sides, float("inf"))
    for _ in range(rounds):
        for name, code in sides.items():
            least[name] = min(least[name], cpu_seconds(code))
    for name in SIDES:
        print(f"{name:45} {least[name]:6.2f} s")
    for ours, theirs in RATIOS:
        print(f"{ours} / {theirs}: {least[ours] / least[theirs]:.2f}")
    for name in extras:
        print(f"{name:45} {least[name] - least['import yapo_peft']:+6.2f} s")


def cpu_seconds(code: str) -> float:
    """Of a process that runs some code."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
