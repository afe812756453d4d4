"""Runs scripts as `python script.py` does, in processes forked from one that has imported the libraries already."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
from pathlib import Path
from subprocess import CompletedProcess

# Importing these takes longer than most scripts.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        *("torch", "transformers.models.llama.modeling_llama", "peft", "trl.trainer.dpo_trainer", "sae_lens", "pandas"),
        *(
            "matplotlib.figure",
            "matplotlib.font_manager",
            "pytest",
            "yapo_peft.trainer.trainer",
            "yapo_peft.evaluation",
        ),
    ]
)


def run_script(
    script: Path | str,
    *arguments: object,
    cwd: Path | None = None,
    environment: dict[str, str] | None = None,
    before: str = "",
    timeout: float = 600,
) -> CompletedProcess[str]:
    """Runs a script and waits for its end.

    Args:
        script: The file.
        *arguments: Of the command line.
        cwd: The working directory; the current one if None.
        environment: Variables to add. Libraries that read theirs on import have done so.
        before: Python code to run first.
        timeout: Seconds until it is stopped.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        command = [str(script), *map(str, arguments)]
        given = (command, str(cwd or Path.cwd()), environment or {}, before, str(out), str(err))
        process = _CONTEXT.Process(target=_run, args=given)
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
        return CompletedProcess(command, process.exitcode, out.read_text(), err.read_text())


def _run(command: list[str], cwd: str, environment: dict[str, str], before: str, out: str, err: str) -> None:
    for stream, path in ((sys.stdout, out), (sys.stderr, err)):
        with open(path, "w") as file:  # noqa: PTH123
            os.dup2(file.fileno(), stream.fileno())
    os.chdir(cwd)
    os.environ.update(environment)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    exec(before, {})
    runpy.run_path(command[0], run_name="__main__")
