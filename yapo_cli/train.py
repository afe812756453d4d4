"""`yapo train`: the training script under `accelerate launch`, as `trl dpo` does it."""

from __future__ import annotations

import typer


def train(context: typer.Context) -> None:
    """Learn an adapter from preference pairs: `trl dpo`, with options for the adapter. See `yapo train --help`."""
    raise typer.Exit(launch(list(context.args)))


def launch(arguments: list[str]) -> int:
    """Launches the training script.

    Options that the script does not know go to `accelerate launch`, such as `--num_processes 2`; `--accelerate_config`
    takes a file or the name of one of TRL's configs.

    Args:
        arguments: The script's and the launcher's, in any order.

    Returns:
        The exit status.
    """
    from subprocess import CalledProcessError

    from accelerate.commands.launch import launch_command, launch_command_parser
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    from yapo_peft.scripts.yapo import make_parser

    *_, steering, from_config, from_command_line = make_parser("yapo train").parse_args_and_config(
        arguments, return_remaining_strings=True, separate_remaining_strings=True
    )
    steering.config()  # so that a bad option is an error here, and not one of every process
    launcher = resolve_accelerate_config_argument(from_config + from_command_line)
    script = _without(arguments, from_command_line)
    try:
        launch_command(launch_command_parser().parse_args([*launcher, "--module", "yapo_peft.scripts.yapo", *script]))
    except CalledProcessError as error:
        # The script has said what is wrong; how it was started says nothing more.
        return error.returncode
    return 0


def _without(arguments: list[str], others: list[str]) -> list[str]:
    """The arguments less some of them, which stand among them in this order."""
    rest = iter([*others, None])
    skip = next(rest)
    kept: list[str] = []
    for argument in arguments:
        if argument == skip:
            skip = next(rest)
        else:
            kept.append(argument)
    return kept
