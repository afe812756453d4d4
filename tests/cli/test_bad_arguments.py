"""Bad input of commands ends in a line that says what is wrong, not in a traceback or in lost work."""

import io
import shutil
import socket
import sys

import pytest

from yapo_cli import main


def test_a_damaged_adapter_is_named_without_a_traceback(run, saved_adapter, tmp_path):
    file = saved_adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    status, _, said = run("generate", saved_adapter, "w1")
    assert status == 2
    assert "truncated or not a safetensors file" in said
    for place, text in enumerate(("{", "[]", "1", '{"peft_type": "NO"}')):
        folder = tmp_path / f"damaged-{place}"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(text)
        status, _, said = run("generate", folder, "w1")
        assert status == 2
        assert "adapter_config.json cannot be read" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "{adapter}"), "pass prompts or --file"),
        (("generate", "{adapter}", "w1", "--chat"), "pass prompts or --file"),
        (("generate", "{adapter}", "w1", "--multipliers", "1,two"), "'1,two': must be comma-separated numbers"),
        (("generate", "{adapter}", "w1", "--multipliers", "nan"), "must be finite numbers"),
        (("generate", "{base}", "w1"), "is not a YaPO adapter"),
        (("generate", "{adapter}", "--chat", "--json"), "omit --json and --plain"),
        (("sweep", "{adapter}", "--dataset", "nowhere.csv"), "The file 'nowhere.csv' does not exist"),
        (("sweep", "{adapter}", "--dataset", "{pairs}", "--plot", "doses"), "the extension must be one of"),
        (("sweep", "{adapter}", "--dataset", "{pairs}", "--chosen", "best"), "no column 'best'"),
        (("prune", "{adapter}", "--features", "5", "--out", "{adapter}"), "is not empty"),
        (("combine", "{adapter}", "{adapter}", "--weights", "1", "--out", "new"), "1 numbers for 2 adapters"),
        (("fit", "caa", "--model", "{base}", "--layers", "two", "--dataset", "{pairs}", "--out", "x"), "whole numbers"),
        (("fit", "sas", "--model", "{base}", "--layers", "2", "--dataset", "{pairs}", "--out", "x"), "sae"),
        (
            ("fit", "caa", "--model", "{adapter}", "--layers", "2", "--dataset", "{pairs}", "--out", "x"),
            "is an adapter: pass a model",
        ),
        (("explain", "{adapter}", "--split", "dev"), "--split dev: it is read with --dataset only"),
        (("attribute", "{adapter}"), "pass --dataset, or else a prompt and two answers"),
        (("attribute", "{adapter}", "w1", "w2", "w3", "--dataset", "{pairs}"), "pass --dataset, or else a prompt"),
        (("attribute", "{adapter}", "w1", "w2"), "'w1' 'w2': pass a prompt, its chosen and its rejected answer"),
        (("attribute", "{adapter}", "w1", "w2", "w3", "--split", "dev"), "--split dev: it is read with --dataset only"),
        (("attribute", "{adapter}", "w1", "w2", "w2"), "1 with equal answers"),
        (("attribute", "{adapter}", "w1", "w2", "w3", "--multiplier", "0"), "--multiplier 0: an adapter has no effect"),
        (("compare-features", "{adapter}"), "pass at least two adapters"),
        (("compare-features", "{adapter}", "{adapter}/"), "an adapter is given twice"),
        (("compare", "{adapter}", "{adapter}/", "--dataset", "{pairs}"), "an adapter is given twice"),
        (("sweep", "{adapter}", "--dataset", "."), "'.' is not a dataset"),
        (("explain", "{adapter}", "--dtype", "foo"), "--dtype 'foo': must be 'auto'"),
        (("explain", "{adapter}", "--dtype", "int8"), "--dtype 'int8': must be 'auto'"),
        (("explain", "{parent}"), "{adapter} has an adapter"),
        (("explain", "/nowhere"), "There is no folder '/nowhere'"),
        (("explain", "nowhere"), "There is no folder 'nowhere', and the Hub could not be read: "),
        (("explain", "no:where"), "There is no folder 'no:where'."),
        (("steer", "{base}", "--feature", "2:3=8", "--sae-id", "x", "--out", "new"), "--sae-release None and --sae-id"),
        (("app", "{base}", "--layers", "2"), "--layers [2] have no SAE: give --sae-release and --sae-id"),
        (("sweep", "{adapter}", "--dataset", "{pairs}", "--plot", "no/doses.x"), "--plot 'no/doses.x': the extension"),
        (("calibrate", "{adapter}", "--max-kl=-1", "--out", "new"), "--max-kl -1.0: must be a positive number"),
        (("contexts", "{adapter}", "--text", "a.txt", "--dataset", "{pairs}"), "pass only one of --text and --dataset"),
        (
            ("contexts", "{adapter}", "--dataset", "{pairs}", "--feature", "9:3"),
            "Features of layer 9: the adapter steers",
        ),
        (
            ("sae", "measure", "{base}", "sae", "--dataset", "{adapter}/adapter_model.safetensors"),
            "must be one of .txt, .md",
        ),
        (("explain", "out/demo/adapter"), "There is no folder 'out/demo/adapter'"),
        (("generate", "{broken}", "w1"), "adapter_config.json cannot be read"),
        (("generate", "{adapter}", "w1", "--repetition-penalty", "0"), "--repetition-penalty 0: must be above 0"),
        (("generate", "{adapter}", "w1", "--repetition-penalty", "nan"), "--repetition-penalty nan: must be above 0"),
        (("generate", "{adapter}", "w1", "--temperature", "1e-320"), "must be 0 for greedy answers, or between"),
        (("generate", "{adapter}", "w1", "--seed", str(2**64)), "4294967295"),
        (("generate", "{adapter}", "w1", "--dtype", "float8_e4m3fn"), "--dtype 'float8_e4m3fn': must be 'auto'"),
        (("generate", "{adapter}", "w1", "--max-new-tokens", "999"), "the model takes at most 256"),
        (("sweep", "{adapter}", "--dataset", "{empty}"), "has no rows"),
        (
            ("combine", "{adapter}", "nowhere", "--weights", "1,1", "--out", "new"),
            "No adapter can be read from",
        ),
        (("train", "--config", "{empty}"), "YAML config cannot be read"),
        (("generate", "{adapter}", "--file", "p.csv"), "p.csv is a dataset: pass one prompt per line, or use"),
        (("steer", "{base}", "--feature", "-1:3=8", "--out", "x"), "layers are counted from 0"),
        (("steer", "{base}", "--feature", "99:3=8", "--sae-path", "{base}", "--out", "x"), "has layers 0 to 3"),
        (("generate", "{adapter}", "--file", "{latin}"), "is not UTF-8 text (byte 1)"),
        (("sweep", "{adapter}", "--dataset", "{pairs}", "--measure", "damage"), "pass a plain text file"),
        (
            ("sweep", "{adapter}", "--dataset", "{latin}", "--measure", "damage", "--chosen", "x"),
            "--measure damage does not read it",
        ),
        (("sweep", "{adapter}", "--dataset", "{pairs}", "--plot", "doses.xyz"), "the extension must be one of"),
        (("sweep", "{adapter}", "--dataset", "{pairs}", "--out", "{parent}"), "is a folder: pass a file"),
        (("sweep", "{adapter}", "--dataset", "{damaged}"), "cannot be read as jsonl"),
        (("sweep", "{parent}", "--dataset", "{pairs}"), "{parent} has neither an adapter nor checkpoints of one"),
        (("sweep", "{adapter}", "{adapter}/", "--dataset", "{pairs}"), "an adapter is given twice"),
        (("sweep", "{adapter}", "{base}", "--dataset", "{pairs}"), "is not a YaPO adapter"),
        (("sweep", "{adapter}", "{broken}", "--dataset", "{pairs}"), "adapter_config.json cannot be read"),
        (
            ("combine", "{adapter}", "{adapter}", "--weights", "1,-1", "--out", "new"),
            "All entries of the adapter are zero",
        ),
        (("push", "{adapter}", "a/b/c"), "'a/b/c' is not a valid repository name"),
        (("sae", "inspect", "{parent}", "x"), "leave out the id"),
        (("push", "{base}", "me/mine"), "No adapter found in"),
        (("train", "--output_dir", "x", "--bf16", "False"), "There is no layer to steer"),
        (("swep",), "No such command 'swep'"),
    ],
)
def test_invalid_arguments_exit_with_status_2(run, saved_adapter, pairs_file, tmp_path, arguments, message):
    places = {"adapter": saved_adapter, "base": tmp_path / "base", "pairs": pairs_file, "parent": tmp_path}
    for name, content in (("latin", b"w\xe4"), ("damaged", b'{"prompt": "w1"\n{'), ("empty", b"")):
        places[name] = tmp_path / f"{name}.{'txt' if name == 'latin' else 'jsonl'}"
        places[name].write_bytes(content)
    places["broken"] = tmp_path / "z-broken"
    places["broken"].mkdir()
    (places["broken"] / "adapter_config.json").write_text("{")
    status, _, stderr = run(*(argument.format(**places) for argument in arguments))
    assert status == 2
    # The box that typer draws wraps lines between words and within paths.
    plain = "".join(stderr.replace("│", " ").split())
    assert "".join(message.format(**places).split()) in plain


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sweep", "{adapter}", "{base}", "--dataset", "{pairs}"), "is not a YaPO adapter"),
        (("sweep", "{adapter}", "{damaged}", "--dataset", "{pairs}"), "truncated or not a safetensors file"),
        (("compare", "{adapter}", "{base}", "--dataset", "{pairs}"), "is not an adapter"),
        (("answers", "{adapter}", "{other}", "--dataset", "{pairs}", "--out", "x.jsonl"), "is for another model than"),
        (("compare-features", "{adapter}", "{other}"), "is for another model than"),
        (("compare-features", "{adapter}", "{base}"), "is not a YaPO adapter"),
        (("compare-features", "{adapter}", "{damaged}"), "truncated or not a safetensors file"),
    ],
)
def test_all_adapters_are_checked_before_a_model_is_loaded(
    run, saved_adapter, pairs_file, tmp_path, monkeypatch, arguments, message
):
    places = {"adapter": saved_adapter, "base": tmp_path / "base", "pairs": pairs_file}
    for name in ("damaged", "other"):
        places[name] = shutil.copytree(saved_adapter, tmp_path / name)
    weights = places["damaged"] / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    config = places["other"] / "adapter_config.json"
    config.write_text(config.read_text().replace(str(tmp_path / "base"), "elsewhere"))
    monkeypatch.setattr("yapo_cli.loading._load_base", lambda *_: pytest.fail("a model is loaded"))
    status, _, stderr = run(*(argument.format(**places) for argument in arguments))
    assert status == 2
    assert message in stderr


def test_a_terminal_that_lacks_a_character_shows_its_code(monkeypatch):
    """An answer that is streamed would end with an error."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["--version"]) == 0
    print("\u4e2d", flush=True)
    assert terminal.buffer.getvalue().endswith(b"\\u4e2d\n")


def test_existing_adapter_is_not_overwritten(run, saved_adapter):
    before = (saved_adapter / "adapter_model.safetensors").read_bytes()
    assert run("prune", saved_adapter, "--features", 5, "--out", saved_adapter)[0] == 2
    assert (saved_adapter / "adapter_model.safetensors").read_bytes() == before


def test_a_busy_port_is_named_before_a_model_is_loaded(run, saved_adapter, monkeypatch):
    monkeypatch.setattr("yapo_cli.loading._load_base", lambda *_: pytest.fail("a model is loaded"))
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        status, _, said = run("app", saved_adapter, "--port", port)
    assert status == 2
    assert f"--port {port}: Address already in use" in " ".join(said.replace("│", " ").split())


def test_no_connection_is_a_failure_and_no_traceback(run, saved_adapter, monkeypatch):
    from httpx import ConnectError

    def refuse(*_, **__):
        raise ConnectError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    status, _, said = run("push", saved_adapter, "me/adapter")
    assert (status, said.splitlines()[-1]) == (1, "yapo push: no connection: Name or service not known")
