"""A trainer on a tiny model."""

import pytest
from cached import HELD_OUT, MANY
from peft import get_peft_model
from tiny import make_model, make_sae, set_code

from yapo_peft import YaPOConfig, YaPOTrainer, YaPOTrainingConfig


@pytest.fixture
def build(tmp_path, pairs, tokenizer):
    """Makes a trainer on a tiny model."""

    def make(
        model="llama", train_dataset=pairs, adapter=None, code=None, out="out", init=None, neutral=None, **options
    ):
        defaults = {"max_steps": 4, "learning_rate": 0.1, "warmup_steps": 0, "logging_steps": 1}
        defaults |= {"learning_rate_unit": "raw", "direction": "batch", "adam_epsilon": 1e-8, "max_kl": None}
        defaults |= {"report_to": "none", "bf16": False, "use_cpu": True}
        args = YaPOTrainingConfig(output_dir=str(tmp_path / out), **defaults | options)
        if isinstance(model, str):
            config = {"layers": 2, "sae": make_sae()} | (adapter or {})
            model = get_peft_model(make_model(model), YaPOConfig(**config))
        if code is not None:
            set_code(model, code)
        init = {"neutral_dataset": neutral, "processing_class": tokenizer} | (init or {})
        return YaPOTrainer(model, args, train_dataset=train_dataset, **init)

    return make


@pytest.fixture
def train(build, tmp_path):
    """Trains, with cached activations or without, and returns the trainer."""

    def run(cached, **options):
        folder = {"cache_activations": True, "activation_cache_dir": str(tmp_path / "activations")} if cached else {}
        options = {"train_dataset": MANY, "init": {"eval_dataset": HELD_OUT}} | options
        trainer = build(**folder, **options)
        trainer.train()
        return trainer

    return run
