"""The `yapo` command."""

from __future__ import annotations

import re
import sys
from io import TextIOWrapper
from typing import Annotated, Any

import typer

from . import (
    answers,
    attribute,
    calibrate,
    choose,
    combine,
    compare,
    compare_features,
    contexts,
    convert,
    culture,
    data,
    doctor,
    evaluate,
    explain,
    export,
    fit,
    generate,
    make,
    migrate,
    playground,
    prune,
    push,
    report,
    sae,
    steer,
    sweep,
    train,
)
from .output import only_json, quiet_libraries

_MAKE, _USE, _MEASURE, _HERE = "Create adapters", "Use adapters", "Evaluate adapters", "Environment"

app = typer.Typer(
    name="yapo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Sparse activation steering of language models: create, use, evaluate and share adapters.",
    epilog="Exit status: 0 on success, 1 on failure, 2 on an invalid option or input.",
)
_PASSED_ON: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
app.command("train", rich_help_panel=_MAKE, add_help_option=False, context_settings=_PASSED_ON)(train.train)
app.command("make", rich_help_panel=_MAKE)(make.make)
app.command("choose", rich_help_panel=_MAKE)(choose.choose)
app.add_typer(fit.app, name="fit", rich_help_panel=_MAKE)
app.command("steer", rich_help_panel=_MAKE)(steer.steer)
app.command("prune", rich_help_panel=_MAKE)(prune.prune)
app.command("calibrate", rich_help_panel=_MAKE)(calibrate.calibrate)
app.command("convert", rich_help_panel=_MAKE)(convert.convert)
app.command("combine", rich_help_panel=_MAKE)(combine.combine)
app.command("migrate", rich_help_panel=_MAKE)(migrate.migrate)
app.add_typer(data.app, name="data", rich_help_panel=_MAKE)
app.command("generate", rich_help_panel=_USE)(generate.generate)
app.command("answers", rich_help_panel=_USE)(answers.answers)
app.command("app", rich_help_panel=_USE)(playground.playground)
app.command("export", rich_help_panel=_USE)(export.export)
app.command("push", rich_help_panel=_USE)(push.push)
app.command("sweep", rich_help_panel=_MEASURE)(sweep.sweep)
app.command("culture", rich_help_panel=_MEASURE)(culture.culture)
app.command("compare", rich_help_panel=_MEASURE)(compare.compare)
app.command("compare-features", rich_help_panel=_MEASURE)(compare_features.compare_features)
app.command("eval", rich_help_panel=_MEASURE)(evaluate.evaluate)
app.command("explain", rich_help_panel=_MEASURE)(explain.explain)
app.command("attribute", rich_help_panel=_MEASURE)(attribute.attribute)
app.command("contexts", rich_help_panel=_MEASURE)(contexts.contexts)
app.command("report", rich_help_panel=_MEASURE)(report.report)
app.add_typer(sae.app, name="sae", rich_help_panel=_HERE)
app.command("doctor", rich_help_panel=_HERE)(doctor.doctor)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("yapo-peft"))
        raise typer.Exit


@app.callback()
def _options(  # pyright: ignore[reportUnusedFunction]
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None: ...


def main(argv: list[str] | None = None) -> int:
    """Runs a subcommand.

    Args:
        argv: Command-line arguments; those of this process if None.

    Returns:
        The exit status: 0 on success, 1 on failure, 2 on an invalid option or input.
    """
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        # A terminal that lacks a character shows its code, rather than ending the work.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with quiet_libraries(), only_json("--json" in argv):
            app(args=argv, prog_name="yapo")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except Exception as error:
        # Of the libraries for HTTP, which raise them when there is no connection.
        is_connection = type(error).__module__.startswith(("httpx", "httpcore", "requests"))
        if not _is_users(error) and not is_connection:
            raise
        words = [argument for argument in argv if not argument.startswith("-")]
        command = " ".join(words[: 2 if words[0] in ("fit", "data", "sae") else 1])
        message = f"no connection: {error}" if is_connection else _in_options(str(error), argv)
        print(f"yapo {command}: {message}", file=sys.stderr)
        return 1 if is_connection or isinstance(error, ConnectionError) else 2
    return 0


def _in_options(message: str, argv: list[str]) -> str:
    """Replaces the names of arguments in a message, such as `batch_size=0`, by the options of the command."""
    command: Any = typer.main.get_command(app)
    for word in argv:
        command = getattr(command, "commands", {}).get(word, command)
    for option in (option for parameter in command.params for option in parameter.opts if option.startswith("--")):
        name = option[2:].replace("-", "_")
        message = re.sub(rf"(?<![\w.-]){name}=", f"{option} ", message)
        # A name without an underscore may be a mere word.
        message = re.sub(rf"(?<![\w.-]){name}(?!\w)", option, message) if "_" in name else message

    def of_value(found: re.Match[str]) -> str:
        name, value = found.groups()
        before = argv[argv.index(value, 1) - 1] if argv[1:].count(value) == 1 else ""
        option = f"--{name}" if f"--{name}" in argv else before
        return f"{option} {value!r}" if option.startswith("--") else found[0]

    # Of `yapo train`, which has no list of options, and arguments of another name than the option whose value it is.
    message = re.sub(r"(?<![\w.-])([a-z_]+)='([^']+)'", of_value, message)
    # The adapter that a command loads.
    return message.replace("adapter 'default'", "the adapter")


def _is_users(error: Exception) -> bool:
    """Whether an error's message is all that a user needs, so that the traceback is omitted."""
    errors = sys.modules.get("yapo_peft.errors")
    # Our own import errors say which extra to install, and unlike Python's have no module name.
    is_missing_extra = isinstance(error, ImportError) and error.name is None
    return (
        isinstance(error, OSError) or is_missing_extra or (errors is not None and isinstance(error, errors.YaPOError))
    )
