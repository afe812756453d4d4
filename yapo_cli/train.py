"""`yapo train`: runs the training script with `accelerate launch`, like `trl dpo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from yapo_peft.evaluation import Candidate


def train(context: typer.Context) -> None:
    """Train an adapter on preference pairs. The options are those of `trl dpo` and the adapter."""
    raise typer.Exit(launch(list(context.args)))


def write_config(file: Path, model: str, candidate: Candidate, **others: Any) -> None:
    """Writes a YAML config of `yapo train` that trains a candidate.

    Args:
        file: The file.
        model: Folder or Hub repository of the model.
        candidate: The adapter.
        **others: More options of `yapo train`.
    """
    import yaml

    from yapo_peft._utils import replacing

    with replacing(file) as partial:
        partial.write_text(
            yaml.safe_dump({"model_name_or_path": model, **candidate.options(), **others}, sort_keys=False)
        )


def launch(arguments: list[str]) -> int:
    """Launches the training script.

    Unknown options are passed to `accelerate launch`, such as `--num_processes 2`; `--accelerate_config` takes a file
    or the name of one of TRL's configs.

    Args:
        arguments: Options of the script and of the launcher, in any order.

    Returns:
        The exit status.
    """
    from subprocess import CalledProcessError

    from accelerate.commands.launch import launch_command, launch_command_parser
    from trl.cli.accelerate_config import resolve_accelerate_config_argument
    from trl.cli.commands.training import _subtract_subsequence  # pyright: ignore[reportPrivateUsage]

    from yapo_peft.scripts.arguments import parse

    (*_, steering), from_config, from_command_line = parse(arguments, "yapo train")
    steering.config()  # validates once, rather than in every process
    launcher = resolve_accelerate_config_argument(from_config + from_command_line)
    script = _subtract_subsequence(arguments, from_command_line)
    try:
        launch_command(launch_command_parser().parse_args([*launcher, "--module", "yapo_peft.scripts.yapo", *script]))
    except CalledProcessError as error:
        # The script has printed its error.
        return error.returncode
    return 0
