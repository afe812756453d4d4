"""LoRA and other adapters are measured like steering ones, to compare them."""

import json

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from tiny import make_model

from yapo_cli import main
from yapo_peft import ConfigError, UnsupportedOperationError, sweep
from yapo_peft.evaluation import Damage, GeneratedChoice

TEXT = ["w1 w2 w3 w4 w5 w6 w7 w8 " * 20]


def make_lora(**options):
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "down_proj"], **options)
    model = get_peft_model(make_model(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return model.eval()


def merged_at(multiplier):
    """The model with the update of the LoRA, `multiplier` times, in its weights."""
    model = make_lora()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(multiplier)
    return model.merge_and_unload().eval()


@pytest.mark.feature("With LoRA", "`sweep` and `yapo compare` of a LoRA, which multipliers scale")
def test_a_lora_is_scaled(pairs, tokenizer):
    model = make_lora()
    before = model(torch.tensor([[5, 6, 7]])).logits
    table = sweep(model, pairs, tokenizer, [-1.0, 0.0, 0.5]).summary().set_index("multiplier")
    damage = sweep(model, TEXT, tokenizer, [-1.0, 0.0, 0.5], measure=Damage(block_size=32)).summary().kl
    assert damage[1] == 0
    assert min(damage[0], damage[2]) > 0
    for multiplier in (-1.0, 0.0, 0.5):
        on_top = get_peft_model(merged_at(multiplier), LoraConfig(r=1, target_modules=["q_proj"]))
        expected = sweep(on_top, pairs, tokenizer, [0.0]).summary().margin[0]
        assert table.margin[multiplier] == pytest.approx(expected, abs=1e-3)
    assert torch.equal(model(torch.tensor([[5, 6, 7]])).logits, before)


def test_other_methods_are_on_or_off(pairs, tokenizer):
    ia3 = IA3Config(task_type="CAUSAL_LM", target_modules=["v_proj"], feedforward_modules=[], init_ia3_weights=False)
    model = get_peft_model(make_model(), ia3).eval()
    margins = sweep(model, pairs, tokenizer, [0.0, 1.0]).summary().margin
    assert margins[0] != margins[1]
    with pytest.raises(ConfigError, match="multiplier=2: only a plain LoRA can be scaled"):
        sweep(model, pairs, tokenizer, [0.0, 2.0])


def test_what_cannot_be_dialled_is_named(pairs, tokenizer):
    with pytest.raises(ConfigError, match="only a plain LoRA can be scaled"):
        sweep(make_lora(use_dora=True), pairs, tokenizer, [0.5])
    merged = make_lora()
    merged.merge_adapter()
    with pytest.raises(ConfigError, match="merged or disabled"):
        sweep(merged, pairs, tokenizer, [0.0, 1.0])
    questions = [{"question": "w1", "options": ["w2", "w3"], "answer": 0}]
    with pytest.raises(UnsupportedOperationError, match="use a measure of log-probabilities"):
        sweep(make_lora(), questions, tokenizer, [0.0, 1.0], measure=GeneratedChoice())


def test_compare_takes_a_lora(saved_adapter, pairs, tmp_path, capsys):
    lora = make_lora()
    lora.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    lora.save_pretrained(tmp_path / "lora")
    pairs.to_json(tmp_path / "pairs.jsonl")
    (tmp_path / "text.txt").write_text(TEXT[0] * 20)
    options = ["--dataset", str(tmp_path / "pairs.jsonl"), "--text", str(tmp_path / "text.txt"), "--json"]
    assert main(["compare", str(tmp_path / "lora"), str(saved_adapter), *options, "--levels", "0.0001"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["adapter"] for row in found} == {"lora", "adapter"}
