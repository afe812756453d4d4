"""Decoders whose layers are found, or named."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import D_MODEL, DEPTH, VOCABULARY, make_sae, random_code, random_ids, set_code
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from yapo_peft import ConfigError, YaPOConfig, steering, sweep


class OwnConfig(PreTrainedConfig):
    model_type = "own"


class OwnDecoder(PreTrainedModel, GenerationMixin):
    """A custom decoder, whose config does not describe it."""

    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(VOCABULARY, D_MODEL)
        self.stack = nn.ModuleList(nn.Linear(D_MODEL, D_MODEL) for _ in range(DEPTH))
        self.head = nn.Linear(D_MODEL, VOCABULARY)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, labels=None, **_):
        hidden = self.embed(input_ids)
        for layer in self.stack:
            hidden = hidden + 0.1 * layer(hidden)
        return CausalLMOutput(logits=self.head(hidden))


def make_decoder():
    torch.manual_seed(0)
    return OwnDecoder(OwnConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval()


@pytest.mark.feature("Architectures", "Custom decoders, whose layers `YaPOConfig(blocks=...)` names")
def test_layers_that_are_not_found_can_be_named(tmp_path, pairs, tokenizer):
    make_sae().save_model(tmp_path / "sae")
    sae = {"layers": -2, "sae_path": str(tmp_path / "sae")}
    with pytest.raises(ConfigError, match=r"YaPOConfig\(blocks=...\), one of 'stack' \(4 modules\)"):
        get_peft_model(make_decoder(), YaPOConfig(**sae))
    with pytest.raises(ConfigError, match=r"blocks='stak': name the list of its layers .* one of 'stack'"):
        get_peft_model(make_decoder(), YaPOConfig(**sae, blocks="stak"))
    model = get_peft_model(make_decoder(), YaPOConfig(**sae, blocks="stack"))
    set_code(model, random_code(scale=3.0))
    model.eval()
    assert model.base_model.model.stack[2].yapo.index == 2
    with torch.no_grad():
        steered, unsteered = model(random_ids()).logits, make_decoder()(random_ids()).logits
        with steering(model, 0.0):
            assert torch.equal(model(random_ids()).logits, unsteered)
    assert not torch.allclose(steered, unsteered)
    margins = sweep(model, pairs, tokenizer, [0.0, 1.0]).summary().margin
    assert margins[0] != margins[1]
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(make_decoder(), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(loaded(random_ids()).logits, steered)


def test_a_model_without_a_list_of_modules_is_refused():
    model = make_decoder()
    model.stack = nn.Sequential(*model.stack)
    with pytest.raises(ConfigError, match=r"OwnDecoder has no nn\.ModuleList that could hold them"):
        get_peft_model(model, YaPOConfig(layers=1, sae=make_sae()))
