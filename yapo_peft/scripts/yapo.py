"""`trl dpo` for steering adapters: the same parser, flags and YAML configs, plus options for adapter, pairs and method.

    python -m yapo_peft.scripts.yapo \
        --model_name_or_path google/gemma-2-2b-it --dtype bfloat16 \
        --dataset_name trl-lib/ultrafeedback_binarized \
        --layers 15 --sae_release gemma-scope-2b-pt-res --sae_id layer_15/width_65k/average_l0_68 \
        --output_dir polite-gemma

`accelerate launch -m yapo_peft.scripts.yapo ...` and `yapo train ...` run it on several processes.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

from yapo_cli.output import quiet_libraries
from yapo_cli.pairs import TrainingPairs
from yapo_peft import ConfigError, YaPOConfig, YaPOError, YaPOTrainer, YaPOTrainingConfig, calibrate, model_card
from yapo_peft.methods import fit_caa, fit_sas, measure_contrast

from .arguments import SteeringArguments, parse

_FITS: dict[str, Any] = {"caa": fit_caa, "sas": fit_sas}


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
    resume = _checkpoint(training_args.resume_from_checkpoint)
    if steering_args.method in _FITS and training_args.push_to_hub:
        raise ConfigError(f"push_to_hub with method={steering_args.method}: upload it afterwards with `yapo push`.")
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **cast(dict[str, Any], training_args.model_init_kwargs or {}),
    }
    train_dataset, eval_dataset = _load_pairs(script_args, training_args, model_args, dataset_args, pairs)
    if steering_args.method in _FITS:
        return _fit(steering_args, peft_config, train_dataset, training_args, model_args, pairs.dataset)
    trainer = YaPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=peft_config,
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(training_args.output_dir)
    dataset_name = pairs.dataset or script_args.dataset_name
    trainer.create_model_card(dataset_name=dataset_name)
    trainer.accelerator.print(f"The adapter is in {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
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


def _checkpoint(given: str | bool | None) -> str | bool | None:
    """The checkpoint to resume from: a folder, or True for the last one.

    Raises:
        ConfigError: There is no such folder.
    """
    if isinstance(given, str) and given.lower() in ("true", "false"):
        return given.lower() == "true" or None
    if isinstance(given, str) and not Path(given).is_dir():
        raise ConfigError(
            f"resume_from_checkpoint={given!r} is not a folder: give a checkpoint-..., or True for the last one."
        )
    return given


def _fit(
    steering_args: SteeringArguments,
    config: YaPOConfig,
    pairs: Any,
    args: YaPOTrainingConfig,
    model_args: ModelConfig,
    dataset: str | None,
) -> None:
    """Fits an adapter to pairs without training, and scales it to the bound of trained ones."""
    from accelerate import PartialState
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    if not PartialState().is_main_process:
        return
    name, method, folder = cast(str, model_args.model_name_or_path), steering_args.method, cast(str, args.output_dir)
    tokenizer = _load_tokenizer(model_args, args)
    base: Any = AutoModelForCausalLM.from_pretrained(name, **cast(dict[str, Any], args.model_init_kwargs))
    model: Any = get_peft_model(base.to(args.device), config)
    contrast = measure_contrast(model, pairs, tokenizer, batch_size=args.per_device_train_batch_size)
    settings = {"tau": steering_args.tau} if method == "sas" else {}
    _FITS[method](model, contrast, **settings)
    if args.max_kl is not None:
        calibrate(model, tokenizer, args.max_kl)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    made = {"method": method, **settings, "pairs": len(pairs), "max_kl": args.max_kl}
    is_chat = bool(getattr(tokenizer, "chat_template", None))
    model_card(model, dataset=dataset, training=made, chat=is_chat).save(Path(folder) / "README.md")
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
