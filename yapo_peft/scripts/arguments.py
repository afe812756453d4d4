"""The options of `yapo train`: those of `trl dpo`, of the adapter and of the method."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, Literal, cast

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser
from yaml import YAMLError

from yapo_cli.pairs import TrainingPairs
from yapo_peft import ConfigError, YaPOConfig, YaPOTrainingConfig
from yapo_peft._utils import choice
from yapo_peft.trainer.config import PUBLISHED

# What each method sets, unless an option does.
METHODS: dict[str, dict[str, Any]] = {
    "yapo": {},
    "bipo": {"space": "dense"},
    "reps": {"loss_type": ["reps"]},
    "caa": {"space": "dense"},
    "sas": {},
}


@dataclass
class SteeringArguments:
    """The fields of `YaPOConfig` that a command line can set."""

    layers: list[int] | None = None
    space: str = YaPOConfig.space
    sae_release: list[str] | None = None
    sae_id: list[str] | None = None
    sae_path: list[str] | None = None
    multiplier: float = YaPOConfig.multiplier
    positions: str = YaPOConfig.positions
    blocks: str | None = None
    method: Literal["yapo", "bipo", "reps", "caa", "sas"] = field(
        default="yapo",
        metadata={
            "help": "yapo; bipo, a dense vector with the same loss; reps, another loss; or caa and sas, which are "
            "fitted to the pairs without training, and then calibrated to max_kl."
        },
    )
    tau: float = field(
        default=0.7,
        metadata={"help": "For sas: the share of answers in which a feature has to be active, from 0 to 1."},
    )
    published: bool = field(
        default=False, metadata={"help": "Start from the paper's hyper-parameters instead of the defaults."}
    )

    def config(self) -> YaPOConfig:
        """The config of the adapter.

        Raises:
            ConfigError: An option is missing or has an invalid value.
        """
        if not self.layers:
            raise ConfigError("There is no layer to steer: give --layers, or layers in the YAML config.")
        ours = ("published", "method", "tau")
        if self.tau != SteeringArguments.tau and self.method != "sas":
            raise ConfigError(f"tau={self.tau}: it is read by method=sas only.")
        values: dict[str, Any] = {name: value for name, value in vars(self).items() if name not in ours}
        is_dense = METHODS[self.method].get("space") == "dense"
        if (is_dense and self.space != "dense") or (self.method == "sas" and self.space != "sae"):
            raise ConfigError(f"method={self.method} makes no adapter of space={self.space!r}: leave space out.")
        if is_dense:
            # So that only the method's name differs between two runs.
            values |= dict.fromkeys(("sae_release", "sae_id", "sae_path"))
        elif self.sae_release is not None and len(self.sae_release) == 1:
            values["sae_release"] = self.sae_release[0]
        return YaPOConfig(**values)


for _option in fields(SteeringArguments):
    if _option.name in YaPOConfig.__dataclass_fields__:
        _option.metadata = YaPOConfig.__dataclass_fields__[_option.name].metadata


def make_parser(prog: str | None = None) -> TrlParser:
    """TRL's parser for `trl dpo`, with our training config, and the options of pairs and of the adapter."""
    types = (ScriptArguments, YaPOTrainingConfig, ModelConfig, DatasetMixtureConfig, TrainingPairs, SteeringArguments)
    return TrlParser(cast(Any, types), prog=prog)


def parse(arguments: list[str] | None = None, prog: str | None = None) -> tuple[list[Any], list[str], list[str]]:
    """Parses arguments and their YAML config; `published` and `method` change the defaults.

    Args:
        arguments: The command line; that of this process if None.
        prog: Name of the command in its help.

    Returns:
        The arguments of `main`; and those of `accelerate launch`, from the config and from the command line.

    Raises:
        ConfigError: An argument is unknown or has an invalid value.
    """
    arguments, parser = _joined(sys.argv[1:] if arguments is None else arguments), make_parser(prog)
    options = {"return_remaining_strings": True, "separate_remaining_strings": True}
    # TRL takes the path of the config out of the list that it is given.
    try:
        found = parser.parse_args_and_config(list(arguments), **options)
        _require_known([*found[-2], *found[-1]], parser)
    except (ValueError, OSError, YAMLError) as error:
        raise ConfigError(f"The arguments or their YAML config cannot be read: {error}") from error
    steering = next(part for part in found if isinstance(part, SteeringArguments))
    choice(METHODS, method=steering.method)
    defaults = METHODS[steering.method] | (PUBLISHED if steering.published else {})
    if defaults:
        parser.set_defaults(**defaults)
        found = parser.parse_args_and_config(list(arguments), **options)
    losses = next(part.loss_type for part in found if isinstance(part, YaPOTrainingConfig))
    if steering.method == "reps" and losses != ["reps"]:
        raise ConfigError(f"method=reps and loss_type={losses} contradict each other: leave loss_type out.")
    return list(found[:-2]), found[-2], found[-1]


def _require_known(others: list[str], parser: TrlParser) -> None:
    """Raises `ConfigError` for an argument that is neither ours nor one of `accelerate launch`."""
    names = [argument.partition("=")[0].lstrip("-") for argument in others if argument.startswith("--")]
    if not names:
        return
    from accelerate.commands.launch import launch_command_parser

    actions = [action for known in (launch_command_parser(), parser) for action in known._actions]  # pyright: ignore[reportPrivateUsage]
    there = {option.lstrip("-").replace("-", "_") for action in actions for option in action.option_strings}
    for name in names:
        if name.replace("-", "_") not in there | {"accelerate_config"}:
            near = get_close_matches(name, there, 1)
            meant = f": did you mean {near[0]}?" if near else "."
            raise ConfigError(f"{name!r} is not an option of yapo train or accelerate launch{meant}")


def _joined(arguments: list[str]) -> list[str]:
    """Gives the values of a repeated --where to the first, because the last one would replace the others."""
    values: list[str] = []
    others: list[str] = []
    is_value = False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        is_value = name == "--where" or (is_value and not argument.startswith("--"))
        if name == "--where":
            values += [value] if equals else []
        else:
            (values if is_value else others).append(argument)
    return [*others, "--where", *values] if "--where" in arguments or values else others
