"""Start-up cost: importing the package relative to PEFT, and `yapo --help` relative to an empty command.

python benchmarks/startup.py

Reports user plus system CPU seconds of fresh processes: the minimum over rounds, because noise only adds time.
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
    "an empty typer command, --help": SMALLEST,
    "yapo --help": "from yapo_cli import main; main(['--help'])",
}
RATIOS = (("import yapo_peft", "import peft"), ("yapo --help", "an empty typer command, --help"))
EXTRAS = {
    "matplotlib ([plots], [report])": "matplotlib.figure",
    "gradio ([app])": "gradio",
    "lm-eval ([eval])": "lm_eval.evaluator, lm_eval.models.huggingface",
}


def main() -> None:
    """Prints the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round without the extras, as a smoke test")
    options = parser.parse_args()
    rounds, extras = (1, {}) if options.quick else (options.rounds, EXTRAS)
    sides = SIDES | {name: f"import yapo_peft, {modules}" for name, modules in extras.items()}
    fastest = dict.fromkeys(sides, float("inf"))
    for _ in range(rounds):
        for name, code in sides.items():
            fastest[name] = min(fastest[name], cpu_seconds(code))
    for name in SIDES:
        print(f"{name:45} {fastest[name]:6.2f} s")
    for ours, theirs in RATIOS:
        print(f"{ours} / {theirs}: {fastest[ours] / fastest[theirs]:.2f}")
    for name in extras:
        print(f"{name:45} {fastest[name] - fastest['import yapo_peft']:+6.2f} s")


def cpu_seconds(code: str) -> float:
    """CPU seconds of a process that runs `code`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
