"""`trl dpo` for steering adapters: the same parser, flags and YAML configs, plus options for the adapter.

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
from typing import Any, cast

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser
from yaml import YAMLError

from yapo_peft import ConfigError, YaPOConfig, YaPOError, YaPOTrainer, YaPOTrainingConfig
from yapo_peft.trainer.config import PUBLISHED


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
        values: dict[str, Any] = {name: value for name, value in vars(self).items() if name != "published"}
        if self.sae_release is not None and len(self.sae_release) == 1:
            values["sae_release"] = self.sae_release[0]
        return YaPOConfig(**values)


for _option in fields(SteeringArguments):
    if _option.name in YaPOConfig.__dataclass_fields__:
        _option.metadata = YaPOConfig.__dataclass_fields__[_option.name].metadata


def make_parser(prog: str | None = None) -> TrlParser:
    """TRL's parser for `trl dpo`, with the options of `YaPOTrainingConfig` and `SteeringArguments`."""
    types = (ScriptArguments, YaPOTrainingConfig, ModelConfig, DatasetMixtureConfig, SteeringArguments)
    return TrlParser(cast(Any, types), prog=prog)


def parse(arguments: list[str] | None = None, prog: str | None = None, **options: Any) -> tuple[Any, ...]:
    """Parses arguments and their YAML config; with `published`, the paper's hyper-parameters are the defaults.

    Args:
        arguments: The command line; that of this process if None.
        prog: Name of the command in its help.
        **options: As for `TrlParser.parse_args_and_config`.
    """
    arguments, parser = sys.argv[1:] if arguments is None else arguments, make_parser(prog)
    # TRL takes the path of the config out of the list that it is given.
    try:
        found = parser.parse_args_and_config(list(arguments), **options)
    except (ValueError, YAMLError) as error:
        raise ConfigError(f"The arguments or their YAML config cannot be read: {error}") from error
    if next(part.published for part in found if isinstance(part, SteeringArguments)):
        parser.set_defaults(**PUBLISHED)
        found = parser.parse_args_and_config(list(arguments), **options)
    return found


def main(
    script_args: ScriptArguments,
    training_args: YaPOTrainingConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
    steering_args: SteeringArguments,
) -> None:
    """Trains, saves and, if asked, pushes an adapter.

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
    dataset = _load_dataset(script_args, dataset_args)
    evaluates = training_args.eval_strategy != "no"
    trainer = YaPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=_split(dataset, script_args.dataset_train_split),
        eval_dataset=_split(dataset, script_args.dataset_test_split) if evaluates else None,
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


def _load_dataset(script_args: ScriptArguments, dataset_args: DatasetMixtureConfig) -> Any:
    from datasets import load_dataset
    from trl import get_dataset

    if dataset_args.datasets and script_args.dataset_name:
        raise ConfigError(
            f"datasets and dataset_name={script_args.dataset_name!r} are both given: keep the mixture or the one name."
        )
    if dataset_args.datasets:
        return get_dataset(dataset_args)
    if script_args.dataset_name:
        return load_dataset(
            script_args.dataset_name, name=script_args.dataset_config, streaming=script_args.dataset_streaming
        )
    raise ConfigError("There is nothing to train on: give dataset_name, or datasets in a YAML config.")


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
        main(*parse(fail_with_unknown_args=False))
    except (YaPOError, OSError) as error:
        raise SystemExit(f"yapo train: {error}") from error


if __name__ == "__main__":
    run()
