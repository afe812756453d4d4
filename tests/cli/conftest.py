"""Runs the command in this process."""

import pytest

from yapo_cli import main


@pytest.fixture
def run(capsys):
    """Runs the command and returns its exit status, standard output and standard error."""

    def run_command(*arguments):
        capsys.readouterr()  # discard earlier output
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run_command


@pytest.fixture
def pairs_file(pairs, tmp_path):
    pairs.to_json(tmp_path / "pairs.jsonl")
    return tmp_path / "pairs.jsonl"
