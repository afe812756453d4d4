"""Models whose head is reached in another way, or whose logits are capped: scores are those of whole passes."""

import pytest
import torch
from damage import TEXT, code_of
from peft import get_peft_model
from tiny import random_code, set_code
from transformers import (
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from yapo_peft import YaPOConfig, steering, sweep
from yapo_peft.interpret import explain

SHAPE = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
SHAPE |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {**SHAPE, "intermediate_size": 64, "num_key_value_heads": 2, "num_local_experts": 4}


def opt():
    return OPTForCausalLM(
        OPTConfig(**SHAPE, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0, max_position_embeddings=64)
    )


def llama4():
    shape = {"intermediate_size_mlp": 64, "head_dim": 8, "attention_chunk_size": 16, "max_position_embeddings": 64}
    return Llama4ForCausalLM(Llama4TextConfig(**LLAMA, **shape))


def recurrent_gemma():
    shape = {"intermediate_size": 64, "num_key_value_heads": 4, "lru_width": 32, "attention_window_size": 16}
    return RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**SHAPE, **shape, logits_soft_cap=2.0))


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**LLAMA, router_aux_loss_coef=0.5))


MODELS = {"opt": opt, "llama4": llama4, "recurrent_gemma": recurrent_gemma, "mixtral": mixtral}


def make_steered(name, space="dense"):
    torch.manual_seed(0)
    base = MODELS[name]().eval()
    with torch.no_grad():
        base.get_input_embeddings().weight.mul_(20)
    model = get_peft_model(base, YaPOConfig(layers=1, space=space))
    set_code(model, random_code(d_sae=32, scale=5.0))
    return model.eval()


def slow_margins(model, pairs, tokenizer, multiplier):
    """The margin of each pair by one whole forward pass per answer, TRL's end of an answer included."""
    found = []
    for pair in pairs:
        logps = []
        for answer in (pair["chosen"], pair["rejected"]):
            prompt = tokenizer.apply_chat_template(pair["prompt"], add_generation_prompt=True, tokenize=False)
            text = tokenizer.apply_chat_template(pair["prompt"] + answer, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
            with torch.no_grad(), steering(model, multiplier):
                log_probs = model(ids).logits[0, :-1].log_softmax(-1)
            logps.append(log_probs.gather(-1, ids[0, 1:, None])[start - 1 :].sum())
        found.append(float(logps[0] - logps[1]))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_sweeps_give_the_margins_of_whole_passes(name, pairs, tokenizer):
    model = make_steered(name)
    table = sweep(model, pairs, tokenizer, [-1.0, 0.0, 1.0]).table
    for multiplier in (-1.0, 0.0, 1.0):
        found = table[table.multiplier == multiplier].sort_values("example").margin.tolist()
        assert found == pytest.approx(slow_margins(model, pairs, tokenizer, multiplier), abs=1e-3)


@pytest.mark.feature("transformers", "Models without a body of their own (OPT, Llama 4), or with capped logits")
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_trainers_give_the_margins_of_whole_passes(name, cached, build, pairs, tokenizer, tmp_path):
    model = make_steered(name)
    plus, zero = (torch.tensor(slow_margins(model, pairs, tokenizer, multiplier)) for multiplier in (1.0, 0.0))
    expected = float((plus - zero).mean())
    assert abs(expected) > 0.02
    cache = {"cache_activations": True, "activation_cache_dir": str(tmp_path / "activations")} if cached else {}
    trainer = build(model, max_kl=0.5, neutral=TEXT, max_steps=2, **cache, init={"eval_dataset": pairs})
    assert trainer.evaluate()["eval_margin/plus"] == pytest.approx(expected, abs=2e-3)
    code = model.get_parameter(code_of(model))
    before = code.detach().clone()
    trainer.train()
    assert not torch.equal(code, before)


def test_own_heads_give_all_of_the_metrics_of_trl(build, pairs, monkeypatch):
    def metrics():
        trainer = build("llama", init={"eval_dataset": pairs})
        return {name: value for name, value in trainer.evaluate().items() if "/" in name or name.endswith("entropy")}

    fused = metrics()
    monkeypatch.setattr("yapo_peft.scoring.lm_head.same", lambda *args: False)
    own = metrics()
    assert own == pytest.approx(fused, rel=1e-4, abs=1e-5)
    assert {"eval_entropy", "eval_logits/chosen", "eval_margin/plus"} <= own.keys()


def test_the_router_of_a_mixture_of_experts_adds_nothing_to_the_loss(build, pairs):
    trainer = build(make_steered("mixtral"), max_steps=1, loss_type="reps")
    trainer.train()
    assert not any("aux_loss" in name for entry in trainer.state.log_history for name in entry)


def test_promoted_tokens_of_a_model_without_a_body_of_its_own(tokenizer):
    table = explain(make_steered("llama4"), tokenizer=tokenizer)
    assert len(table) == 1
