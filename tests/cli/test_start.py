"""Start-up, help and completion of the command, and `yapo doctor`."""

import json
import subprocess
import sys
import warnings

import pytest
from typer.main import get_command

from yapo_cli import main
from yapo_cli.main import app
from yapo_peft import ConfigError


def every_command(command=None, path=()):
    command = get_command(app) if command is None else command
    for name, inner in getattr(command, "commands", {}).items():
        yield from every_command(inner, (*path, name))
    if not getattr(command, "commands", {}):
        yield path, command


@pytest.mark.feature("Commands", "`yapo --help` and shell completion without importing torch")
@pytest.mark.parametrize("arguments", [("--help",), ("generate", "--help"), ("fit", "sas", "--help"), ("--version",)])
def test_help_imports_no_heavy_packages(arguments):
    code = (
        "import sys; from yapo_cli import main; status = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'peft', 'yapo_peft', 'pandas', 'numpy'} & set(sys.modules); "
        "sys.exit(status or len(heavy))"
    )
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)


COMMANDS = dict(every_command())


@pytest.mark.parametrize("path", COMMANDS, ids="-".join)
def test_commands_and_options_have_help(path):
    command = COMMANDS[path]
    assert command.help
    self_explanatory = {"max_new_tokens", "num_fewshot", "apply_chat_template", "port", "help"}
    assert [option.name for option in command.params if option.name not in self_explanatory and not option.help] == []


def test_shell_completion_suggests_commands():
    environment = {"_YAPO_COMPLETE": "complete_bash", "COMP_WORDS": "yapo ge", "COMP_CWORD": "1"}
    command = [sys.executable, "-m", "yapo_cli"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.stdout.split() == ["generate"]


@pytest.mark.feature("Commands", "`yapo doctor`: versions, devices and missing packages")
def test_doctor_reports_packages_and_devices(capsys, monkeypatch):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["packages"]["torch"]["fits"]
    assert report["devices"][-1]["device"] == "cpu"
    assert report["hub"]["offline"]
    monkeypatch.setattr("yapo_cli.doctor.find_spec", lambda name: None)
    installed = __import__("importlib.metadata").metadata.version
    monkeypatch.setattr("yapo_cli.doctor.version", lambda name: "0.1" if name == "peft" else installed(name))
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "pip install -U 'peft<0.22,>=0.21.2'" in printed
    assert "pip install 'yapo-peft[app]'" in printed


def test_what_libraries_tell_developers_is_left_out(capsys, monkeypatch):
    def load(*_):
        warnings.warn("it will be renamed", FutureWarning, stacklevel=1)
        raise ConfigError("The adapter is not there.")

    monkeypatch.setattr("yapo_cli.loading.load_tokenizer", load)
    assert main(["explain", "adapter"]) == 2
    assert capsys.readouterr().err == "yapo explain: The adapter is not there.\n"
