"""The example scripts and notebooks run as users run them, on a tiny model instead of the embedded one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from forked import run_script
from nbclient import NotebookClient
from peft import AutoPeftModelForCausalLM, get_peft_model
from sae_lens import SAE
from tiny import D_MODEL, inference_sae, make_model, make_sae, random_code, set_code

from yapo_peft import YaPOConfig

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
pytestmark = pytest.mark.slow

# Replaces the module `embedded` that the examples import with one that has a tiny model.
STAND_IN = """
import sys, types
from pathlib import Path
sys.path.insert(0, {tests!r})
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
module = types.ModuleType("embedded")
HERE = Path({workplace!r})
module.SETS = ("enthusiasm", "caution")
module.ASSETS = HERE
module.model_folder = lambda: HERE / "base"
module.load_model_and_tokenizer = lambda: (
    AutoModelForCausalLM.from_pretrained(HERE / "base"), AutoTokenizer.from_pretrained(HERE / "base")
)
module.preferences = lambda name, split: load_dataset("json", data_files=str(HERE / "pairs.jsonl"), split="train")
module.sae_folder = lambda: str(HERE / "sae")
module.sae_layer = lambda *_: 2
sys.modules["embedded"] = module
"""


@pytest.fixture
def workplace(tmp_path, tokenizer, pairs):
    """A folder with a model, an SAE, preference pairs and two adapters."""
    make_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    inference_sae(make_sae(layer=2), tmp_path / "sae")
    pairs.to_json(tmp_path / "pairs.jsonl")
    for seed, name in enumerate(("first", "second")):
        model = get_peft_model(make_model(), YaPOConfig(layers=2, sae_path=str(tmp_path / "sae")))
        set_code(model, random_code(seed=seed))
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        model.save_pretrained(tmp_path / name)
    return tmp_path


def run(workplace, script, *arguments):
    stand_in = STAND_IN.format(tests=str(ROOT / "tests"), workplace=str(workplace))
    done = run_script(EXAMPLES / script, *arguments, cwd=workplace, before=stand_in)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_train(workplace):
    printed = run(workplace, "train.py", "--out", "trained", "--epochs", 1)
    assert "Saved the adapter to trained" in printed
    log = json.loads((workplace / "trained" / "trainer_state.json").read_text())["log_history"]
    assert any("eval_accuracy/plus" in entry for entry in log)
    options = ("--model", workplace / "base", "--layers", 1, "--sae-path", workplace / "sae2")
    inference_sae(make_sae(layer=1), workplace / "sae2")
    run(workplace, "train.py", *options, "--dataset", workplace / "pairs.jsonl", "--out", "own", "--epochs", 1)
    config = AutoPeftModelForCausalLM.from_pretrained(workplace / "own").peft_config["default"]
    assert config.layers == [1]


def test_multi_adapter(workplace):
    printed = run(workplace, "multi_adapter.py", "first", "second", "w1 w2", "--max-new-tokens", 5)
    titles = [line for line in printed.splitlines() if line.startswith("---")]
    assert len(titles) == 3
    assert printed.count("\n* ") == 5


def test_gallery(workplace):
    """Six adapters, of which those that are there are not made again."""
    options = ("--out", "gallery", "--page", "page.md", "--steps", 3, "--pairs", 4, "--max-kl", 0.01)
    run(workplace, "gallery.py", *options)
    page = (workplace / "page.md").read_text()
    names = [f"{name}-{method}" for name in ("enthusiasm", "caution") for method in ("yapo", "bipo", "caa")]
    assert [line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")] == names
    assert page.count("| feature | promotes |") == 2
    for name in names:
        (workplace / "gallery" / name / "adapter_model.safetensors").unlink()
    run(workplace, "gallery.py", *options)
    assert (workplace / "page.md").read_text() == page


def test_lm_eval_tasks(workplace):
    printed = run(workplace, "lm_eval_tasks.py", "first", "--multipliers", "0", "1", "--limit", "3")
    assert [line.split()[0] for line in printed.splitlines() if line.lstrip().startswith("facts")] == ["facts", "facts"]


def test_custom_sae(workplace):
    printed = run(workplace, "custom_sae.py", "--out", "custom", "--pairs", 8, "--tau", 0.9)
    assert "% of the variance" in printed
    saved, given = (SAE.load_from_disk(workplace / folder) for folder in ("custom/sae", "sae"))
    assert torch.equal(saved.encode(torch.ones(1, D_MODEL)), given.encode(torch.ones(1, D_MODEL)))
    assert float(printed.split("logits differ by at most ")[1].split()[0].rstrip(".")) < 1e-4


def test_trl_dpo_script(workplace):
    """The script passes the model, data and SAE, and leaves other options to TRL."""
    (workplace / "data").mkdir()
    for split in ("train", "test"):
        (workplace / "data" / f"{split}.jsonl").write_text((workplace / "pairs.jsonl").read_text())
    options = ["--max_steps", "2", "--layers", "2", "--sae_path", str(workplace / "sae"), "--use_cpu", "true"]
    options += ["--dataset_name", str(workplace / "data")]
    paths = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"MODEL": str(workplace / "base"), "OUT": str(workplace / "trl"), "PATH": paths}
    command = ["bash", str(EXAMPLES / "trl_dpo_script.sh"), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (workplace / "trl" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", ["first_steering", "reading_features"])
def test_notebook_runs(workplace, name, monkeypatch):
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    stand_in = STAND_IN.format(tests=str(ROOT / "tests"), workplace=str(workplace))
    notebook.cells.insert(0, nbformat.v4.new_code_cell(stand_in))
    monkeypatch.chdir(workplace)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()


@pytest.mark.parametrize("name", ["first_steering", "reading_features"])
def test_notebook_includes_outputs(name):
    """Notebooks are also read on GitHub, without being run."""
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert sum(bool(cell.outputs) for cell in code) >= 3
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    assert not [output for cell in code for output in cell.outputs if str(Path.home()) in str(output)]
    assert (EXAMPLES / f"{name}.ipynb").stat().st_size < 400_000
