"""`trl dpo` for steering adapters: the same parser, flags and YAML configs, plus options for adapter, pairs and method.

    python -m yapo_peft.scripts.yapo \
        --model_name_or_path google/gemma-2-2b-it --dtype bfloat16 \
        --dataset_name trl-lib/ultrafeedback_binarized \
        --layers 15 --sae_release gemma-scope-2b-pt-res --sae_id layer_15/width_65k/average_l0_68 \
        --output_dir polite-gemma

`accelerate launch -m yapo_peft.scripts.yapo ...` and `yapo train ...` run it on several processes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, cast

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser
from yaml import YAMLError

from yapo_cli.output import quiet_libraries
from yapo_cli.pairs import TrainingPairs
from yapo_peft import ConfigError, YaPOConfig, YaPOError, YaPOTrainer, YaPOTrainingConfig, calibrate
from yapo_peft._utils import choice
from yapo_peft.methods import fit_caa, fit_sas, measure_contrast
from yapo_peft.trainer.config import PUBLISHED

# What each method sets, unless an option does.
METHODS: dict[str, dict[str, Any]] = {
    "yapo": {},
    "bipo": {"space": "dense"},
    "reps": {"loss_type": ["reps"]},
    "caa": {"space": "dense"},
    "sas": {},
}
_FITS: dict[str, Any] = {"caa": fit_caa, "sas": fit_sas}


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
        ours = ("published", "method")
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
    except (ValueError, YAMLError) as error:
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


def main(
    script_args: ScriptArguments,
    training_args: YaPOTrainingConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
    pairs: TrainingPairs,
    steering_args: SteeringArguments,
) -> None:
    """Trains or fits, saves and, if asked, pushes an adapter.

    Raises:
        ConfigError: An option has an invalid value or belongs to LoRA.
    """
    from trl import get_quantization_config

    _require_no_lora(model_args)
    if model_args.model_name_or_path is None:
        raise ConfigError("model_name_or_path is missing: give the name or path of a model.")
    peft_config = steering_args.config()
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **cast(dict[str, Any], training_args.model_init_kwargs or {}),
    }
    train_dataset, eval_dataset = _load_pairs(script_args, training_args, model_args, dataset_args, pairs)
    if steering_args.method in _FITS:
        return _fit(steering_args.method, peft_config, train_dataset, training_args, model_args)
    trainer = YaPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=peft_config,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    trainer.create_model_card(dataset_name=script_args.dataset_name)
    trainer.accelerator.print(f"The adapter is in {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        trainer.accelerator.print(f"It is pushed to {trainer.hub_model_id}.")
    trainer.end()


def _load_pairs(
    script_args: ScriptArguments,
    training_args: YaPOTrainingConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
    pairs: TrainingPairs,
) -> tuple[Any, Any]:
    """Pairs to train on, and to evaluate on or None."""
    from transformers.trainer_utils import IntervalStrategy
    from trl import get_dataset

    given = {"dataset": pairs.dataset, "dataset_name": script_args.dataset_name, "datasets": dataset_args.datasets}
    given = {name: value for name, value in given.items() if value}
    if len(given) != 1:
        found = " and ".join(given)
        options = "--dataset, --dataset_name, or datasets in a YAML config"
        raise ConfigError(
            f"{found} are given: keep one of them." if given else f"There is nothing to train on: give {options}."
        )
    if pairs.dataset is None:
        pairs.require_unread()
        evaluates = training_args.eval_strategy != "no"
        dataset: Any = get_dataset(dataset_args) if dataset_args.datasets else _load_by_name(script_args)
        test = _split(dataset, script_args.dataset_test_split) if evaluates else None
        return _split(dataset, script_args.dataset_train_split), test
    for name in ("dataset_config", "dataset_streaming", "dataset_train_split", "dataset_test_split"):
        value = getattr(script_args, name)
        if value != getattr(ScriptArguments(), name):
            raise ConfigError(f"{name}={value!r} is read with dataset_name only: give --split and --eval_split.")
    train, test = pairs.load_both(_load_tokenizer(model_args, training_args), training_args.seed)
    if test is not None and training_args.eval_strategy == "no":
        training_args.eval_strategy = IntervalStrategy.EPOCH
    if test is None and training_args.eval_strategy != "no":
        raise ConfigError(
            f"eval_strategy={training_args.eval_strategy!s} needs pairs to evaluate on: give --eval_split."
        )
    return train, test


def _load_by_name(script_args: ScriptArguments) -> Any:
    from datasets import load_dataset

    name = cast(str, script_args.dataset_name)
    if Path(name).is_file() or any((Path(name) / f"dataset_{kind}.json").is_file() for kind in ("info", "dict")):
        raise ConfigError(f"dataset_name={name!r} is a file or a saved dataset: pass it with --dataset instead.")
    return load_dataset(name, name=script_args.dataset_config, streaming=script_args.dataset_streaming)


def _load_tokenizer(model_args: ModelConfig, args: YaPOTrainingConfig) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        model_args.model_name_or_path, revision=model_args.model_revision, trust_remote_code=args.trust_remote_code
    )


def _fit(method: str, config: YaPOConfig, pairs: Any, args: YaPOTrainingConfig, model_args: ModelConfig) -> None:
    """Fits an adapter to pairs without training, and scales it to the bound of trained ones."""
    from accelerate import PartialState
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    if not PartialState().is_main_process:
        return
    name = cast(str, model_args.model_name_or_path)
    tokenizer = _load_tokenizer(model_args, args)
    base: Any = AutoModelForCausalLM.from_pretrained(name, **cast(dict[str, Any], args.model_init_kwargs))
    model: Any = get_peft_model(base.to(args.device), config)
    _FITS[method](model, measure_contrast(model, pairs, tokenizer, batch_size=args.per_device_train_batch_size))
    if args.max_kl is not None:
        calibrate(model, tokenizer, args.max_kl)
    model.save_pretrained(args.output_dir)
    print(f"The adapter is in {args.output_dir}.")


def _split(dataset: Any, name: str) -> Any:
    if name not in dataset:
        raise ConfigError(
            f"The dataset has no split {name!r} but {', '.join(map(repr, dataset))}: choose one with "
            "dataset_train_split or dataset_test_split."
        )
    return dataset[name]


def _require_no_lora(model_args: ModelConfig) -> None:
    """Rejects LoRA's options, which would have no effect; `use_peft` is what this script does."""
    defaults = ModelConfig()
    for option in fields(ModelConfig):
        value = getattr(model_args, option.name)
        is_lora = option.name.startswith("lora_") or option.name in ("use_rslora", "use_dora")
        if is_lora and value != getattr(defaults, option.name):
            raise ConfigError(f"{option.name}={value!r} belongs to LoRA.")


def run() -> None:
    """Trains with the command line of this process; errors that are the user's to mend end it without a traceback."""
    try:
        with quiet_libraries():
            main(*parse()[0])
    except (YaPOError, OSError) as error:
        raise SystemExit(f"yapo train: {error}") from error


if __name__ == "__main__":
    run()
