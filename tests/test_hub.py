"""Sharing adapters: pushed to a server that speaks the Hub's protocol, and loaded from it in another process."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import TOKEN, running_hub
from tiny import random_code

from yapo_peft._version import __version__

pytestmark = pytest.mark.slow


def as_user(hub, home: Path, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Runs Python in a process of its own, as somebody with a cache of their own."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, check=False, cwd=cwd
    )


@pytest.fixture(scope="module")
def hub():
    with running_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory, hub, tokenizer):
    """Where the two users keep what they saw."""
    folder = tmp_path_factory.mktemp("hub")
    tokenizer.save_pretrained(folder / "tokenizer")
    for job in ("push", "download"):
        run = as_user(hub, folder / job, str(Path(__file__).with_name("hub_client.py")), job, str(folder))
        assert run.returncode == 0, run.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def expected(folder):
    return torch.load(folder / "expected.pt")


@pytest.fixture(scope="module")
def got(folder):
    return torch.load(folder / "got.pt")


@pytest.mark.feature(
    "Hub", "`push_to_hub`, and `PeftModel` or `AutoPeftModelForCausalLM.from_pretrained` of a repository"
)
@pytest.mark.parametrize(
    ("name", "pushed"),
    [
        ("default", "default"),
        ("tag", "default"),
        ("revision", "revision"),
        ("subfolder", "subfolder"),
        ("private", "default"),
        ("trained", "trained"),
        ("by the command", "by the command"),
    ],
)
def test_what_is_pushed_steers_alike_where_it_is_loaded(got, expected, name, pushed):
    assert isinstance(got[name], torch.Tensor), got[name]
    assert torch.equal(got[name], expected[pushed].expand_as(got[name]))
    others = {key: value for key, value in expected.items() if isinstance(value, torch.Tensor)}
    others = {key: value for key, value in others.items() if not torch.equal(value, expected[pushed])}
    assert len(others) >= 3
    assert not any(torch.equal(got[name][0], value) for value in others.values())


@pytest.mark.feature("vLLM", "Adapters by their Hub id")
def test_a_server_reads_an_adapter_by_its_id(got):
    code = random_code(seed=1)
    assert torch.equal(got["for vLLM"], code[code != 0])


@pytest.mark.parametrize("name", ["refused", "unknown"])
def test_what_cannot_be_loaded_is_an_error(got, name):
    assert isinstance(got[name], str)
    assert "tester/" in got[name]


def test_a_repository_holds_kilobytes_and_no_weights_of_model_or_sae(folder, hub):
    files = hub.files("tester/adapter")
    weights = {path for path in files if path.endswith((".safetensors", ".bin", ".pt"))}
    assert weights == {"adapter_model.safetensors", "other/adapter_model.safetensors"}
    assert all(len(files[path]) < 4096 for path in weights)


@pytest.mark.feature("Hub", "A model card with SAE, layers, training data, metrics and a snippet that runs")
def test_the_card_says_what_was_trained_where_and_how(folder, hub):
    card = (folder / "card.md").read_text()
    header = card.split("---")[1]
    for line in ("library_name: peft", "base_model: tester/base", "- tester/pairs", "- yapo", "- trl"):
        assert line in header
    for text in ("`tester/saes`, `layer_2`", "| 2 |", "| learning_rate | 0.1 |", "eval_accuracy/plus", __version__):
        assert text in card
    assert hub.files("tester/trained")["README.md"].decode() == card
    assert "tester/pairs" in hub.files("tester/adapter", "v1")["README.md"].decode()


@pytest.mark.feature("PEFT", "Loading an adapter without `import yapo_peft` first", refused="PEFT has no plugins")
def test_the_cards_snippet_runs_and_does_not_without_its_first_line(folder, hub):
    snippet = re.search(r"```python\n(.*?)```", (folder / "card.md").read_text(), re.DOTALL)[1]
    run = as_user(hub, folder / "reader", "-c", snippet)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.strip()
    forgotten = re.sub(r"import yapo_peft.*\n", "", snippet)
    run = as_user(hub, folder / "reader", "-c", forgotten)
    assert "KeyError: 'YAPO'" in run.stderr


@pytest.mark.feature("Hub", "`yapo push`: an adapter with its card, and nothing that training left beside it")
def test_the_command_pushes_what_a_user_needs(folder, hub, expected):
    files = hub.files("tester/pushed")
    assert set(files) >= {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    assert not [name for name in files if "checkpoint" in name or name.endswith(".bin")]
    card = files["README.md"].decode()
    assert '.from_pretrained("tester/pushed")' in card
    assert "folder/of/this/adapter" not in card
    assert hub.repositories["tester/pushed"].private
    assert json.loads(files["adapter_config.json"])["self_contained"]
    sizes = {name: len(content) for name, content in hub.files("tester/saes").items()}
    assert dict(expected["files of the SAEs"]) == sizes


def test_what_is_no_adapter_is_told_apart(hub, folder, tmp_path):
    code = (
        "from yapo_cli.main import main; print(main(['explain', 'tester/nowhere']), main(['explain', 'tester/base']))"
    )
    run = as_user(hub, tmp_path, "-c", code)
    assert run.stdout.split() == ["2", "2"]
    assert "There is no folder 'tester/nowhere', and no such repository that you can read on the Hub." in run.stderr
    assert "'tester/base' is not a YaPO adapter" in run.stderr
