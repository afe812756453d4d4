"""Setups that the activation cache does not support are rejected before any computation."""

import pytest
from cached import MANY
from peft import get_peft_model
from tiny import make_model, make_sae
from torch import nn

from yapo_peft import ActivationCacheError, ConfigError, UnsupportedOperationError, YaPOConfig


def test_noise_outside_of_dropout_modules_is_rejected(train):
    base = make_model()
    for block in base.model.layers:
        block.self_attn.attention_dropout = 0.3
    with pytest.raises(UnsupportedOperationError, match="adds noise in training mode"):
        train(True, model=get_peft_model(base, YaPOConfig(layers=2, sae=make_sae())))


def test_another_active_adapter_needs_another_trainer(build, tmp_path):
    model = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae()), adapter_name="first")
    for name, layer in (("same layer", 2), ("above", 3), ("below", 1)):
        model.add_adapter(name, YaPOConfig(layers=layer, sae=make_sae(seed=5)))
    folder = {"cache_activations": True, "activation_cache_dir": str(tmp_path / "activations")}
    trainer = build(model=model, **folder)
    for name in ("same layer", "above", "below"):
        model.set_adapter(name)
        with pytest.raises(ConfigError, match="Create a new trainer"):
            trainer.train()


class Skipping(nn.Module):
    """A layer that passes something to a later layer besides its output."""

    def __init__(self, block):
        super().__init__()
        self.block = block
        self.attention_type = getattr(block, "attention_type", None)

    def forward(self, hidden_states, *args, **kwargs):
        Skipping.seen = hidden_states.sum(dim=(0, 1))
        return self.block(hidden_states, *args, **kwargs)


def test_models_whose_layers_cannot_be_skipped_are_rejected(train):
    model = make_model()
    upper = model.model.layers[3]
    model.model.layers[1] = Skipping(model.model.layers[1])
    forward = upper.forward
    upper.forward = lambda hidden_states, *args, **kwargs: forward(hidden_states, *args, **kwargs) + Skipping.seen
    model = get_peft_model(model, YaPOConfig(layers=2, sae=make_sae()))
    with pytest.raises(ActivationCacheError, match="depends on more than the output of the one below"):
        train(True, model=model)


REFUSED = {
    "a stream": ({"train_dataset": MANY.to_iterable_dataset()}, UnsupportedOperationError, "without streaming"),
    "keep_end": ({"max_length": 13, "truncation_mode": "keep_end"}, UnsupportedOperationError, "keep_start"),
    "torch_compile": ({"torch_compile": True}, UnsupportedOperationError, "torch_compile"),
    "reference twice": ({"precompute_ref_log_probs": True}, ConfigError, "part of cache_activations"),
    "dtype": ({"activation_cache_dtype": "int8"}, ConfigError, "'float32', 'bfloat16', 'float16'"),
    "collator": ({"init": {"data_collator": lambda rows: {}}}, UnsupportedOperationError, "data_collator"),
}


@pytest.mark.filterwarnings("ignore:.*are cut to max_length=13")
@pytest.mark.filterwarnings("ignore:.*keep_end")
@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_options_fail_before_any_computation(train, name, tmp_path):
    options, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        train(True, **options)
    assert not (tmp_path / "activations").exists()


def test_dropout_and_other_trainable_parameters_are_rejected(train):
    model = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae()))
    model.get_base_model().model.layers[0].mlp.drop = nn.Dropout(0.1)
    with pytest.raises(UnsupportedOperationError, match="applies dropout"):
        train(True, model=model, disable_dropout=False)
    model = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae(), modules_to_save=["lm_head"]))
    with pytest.raises(UnsupportedOperationError, match="trained as well"):
        train(True, model=model)


@pytest.mark.parametrize("option", ["activation_cache_dir", "activation_cache_dtype"])
def test_options_of_the_cache_need_it(train, option):
    with pytest.raises(ConfigError, match="needs cache_activations=True"):
        train(False, **{option: "float16"})
