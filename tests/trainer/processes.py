"""Trains on one process or two, and writes what each saw: `processes.py FOLDER WORLD_SIZE [resume]`."""

import copy
import sys
from pathlib import Path

import datasets
import torch
import torch.distributed as dist
from peft import get_peft_model, get_peft_model_state_dict
from tiny import make_model, make_sae, random_code, random_ids, set_code, trained_codes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoTokenizer, TrainerCallback
from transformers.integrations import is_deepspeed_available

from yapo_peft import NonFiniteLossError, YaPOConfig, YaPOTrainer, YaPOTrainingConfig
from yapo_peft._utils import whole
from yapo_peft.tuner.adapters import steered_layers

FOLDER, WORLD = (Path(sys.argv[1]), int(sys.argv[2])) if __name__ == "__main__" else (Path(), 1)
PAIRS = 4  # of the global batch
TEXT = ["w1 w5 w9 w2 w30 w31 w7 w8", "w3 w4 w60 w61 w62 w10", "w90 w80 w70 w11 w12"]
RUNS = {
    "batch": {},
    "example": {"direction": "example"},
    "both": {"direction": "both", "gradient_accumulation_steps": 2, "precompute_ref_log_probs": True},
    "cached": {"cache_activations": True},
    "units": {"learning_rate_unit": "activation"},
    "budget": {"max_kl": 5e-4},
    "features": {"max_features": 12, "from_zero": True},
    "two layers": {"layers": [1, 3], "activation_checkpointing": "full"},
}


def trainer(name, max_steps=4, layers=(2,), from_zero=False, **options):
    saes = [make_sae(seed=layer) for layer in layers]
    model = get_peft_model(make_model(), YaPOConfig(layers=list(layers), sae=saes))
    if not from_zero:
        set_code(model, random_code(scale=0.3))
    if options.get("cache_activations"):
        options["activation_cache_dir"] = str(FOLDER / f"activations-{WORLD}")
    plain = {"learning_rate_unit": "raw", "direction": "batch", "adam_epsilon": 1e-8, "max_kl": None}
    options = plain | options
    args = YaPOTrainingConfig(
        output_dir=str(FOLDER / f"{name}-{WORLD}"), use_cpu=True, bf16=False, report_to="none", max_steps=max_steps,
        save_steps=2, learning_rate=0.1, warmup_steps=0, lr_scheduler_type="constant", logging_steps=1,
        per_device_train_batch_size=PAIRS // WORLD, per_device_eval_batch_size=2, **options,
    )  # fmt: skip
    train, test = (datasets.load_from_disk(str(FOLDER / part)) for part in ("train", "test"))
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "tokenizer")
    neutral = TEXT if options["max_kl"] or options.get("max_features") else None
    return YaPOTrainer(
        model, args, train_dataset=train, eval_dataset=test, processing_class=tokenizer, neutral_dataset=neutral
    )


def result(built):
    log = [{key: entry[key] for key in ("loss", "grad_norm")} for entry in built.state.log_history if "loss" in entry]
    codes = [whole(layer.yapo_code["default"]) for layer in steered_layers(built.model)]
    return {"codes": torch.stack(codes), "log": log}


def zero(stage):
    """DeepSpeed's config; nothing is small enough to stay whole in each process."""
    config = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
    config["zero_optimization"]["stage3_model_persistence_threshold"] = 0
    automatic = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return config | {name: "auto" for name in automatic} | {"zero_allow_untested_optimizer": True}


def train(name, options):
    built = trainer(name, **options)
    built.train()
    ours = ("eval_loss", "eval_loss/", "eval_margin/", "eval_accuracy/")
    evaluated = {key: value for key, value in built.evaluate().items() if key == ours[0] or key.startswith(ours[1:])}
    built.save_model()
    return result(built) | {"evaluated": evaluated, "model": type(built.model_wrapped).__name__}


def resume(name):
    """Goes on from the half-way checkpoint of another number of processes."""
    built = trainer(f"resumed-{name}", **RUNS[name])
    built.train(resume_from_checkpoint=str(FOLDER / f"{name}-{3 - WORLD}" / "checkpoint-2"))
    return result(built)


def break_the_last_process():
    built = trainer("broken")

    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2 and built.accelerator.process_index == WORLD - 1:
                set_code(built.model, torch.full_like(trained_codes(built)[0], float("nan")))

    built.add_callback(Break())
    try:
        built.train()
    except NonFiniteLossError as error:
        return str(error)


def shard(dtype):
    """Logits, gradients and saved tensors with and without FSDP2."""
    model = get_peft_model(make_model(dtype=dtype), YaPOConfig(layers=[1, 2], sae=[make_sae(), make_sae()])).eval()
    set_code(model, random_code())
    found = []
    for sharded in (copy.deepcopy(model), model):
        if sharded is model:
            mesh = init_device_mesh("cpu", (WORLD,))
            for block in model.base_model.model.model.layers:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        logits = sharded(random_ids()).logits
        logits.float().logsumexp(-1).sum().backward()
        gradients = [layer.yapo_code["default"].grad for layer in steered_layers(sharded)]
        if sharded is model:
            gradients = [gradient.full_tensor() for gradient in gradients]
        found.append((logits.detach(), torch.stack(gradients), get_peft_model_state_dict(sharded)))
    return found


if __name__ == "__main__":
    datasets.disable_progress_bars()
    if len(sys.argv) > 3:
        results = {"resumed": {name: resume(name) for name in ("batch", "example")}}
    else:
        results = {name: train(name, options) for name, options in RUNS.items()} | {"broken": break_the_last_process()}
        if WORLD > 1:
            results["sharded"] = {str(dtype): shard(dtype) for dtype in (torch.float32, torch.bfloat16)}
            # Last, because it patches what makes models.
            if is_deepspeed_available():
                results["zero with a budget"] = train("zero budget", {"deepspeed": zero(2), **RUNS["budget"]})
                for stage in (1, 2, 3):
                    results[f"zero {stage}"] = train(f"zero {stage}", {"deepspeed": zero(stage)})
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.save(results, FOLDER / f"{'resumed' if len(sys.argv) > 3 else 'trained'}-{WORLD}-{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()
