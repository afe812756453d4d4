import pytest
import torch
from _reference.yapo import completion_logp, steer_block
from peft import get_peft_model
from tiny import ARCHITECTURES, D_MODEL, VOCABULARY, make_model, make_sae, preference_rows, random_code, set_code
from transformers import AutoModelForCausalLM, GPTNeoConfig

from yapo_peft import ConfigError, DatasetError, YaPOConfig, sweep
from yapo_peft.tuner.blocks import decoder_blocks, hidden_states


def steered():
    model = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae()))
    set_code(model, random_code())
    return model


def slow_margins(rows, tokenizer, multiplier):
    """Margins with one answer per forward pass, on an unwrapped model."""
    model, margins = make_model(), []
    if multiplier:
        steer_block(model.model.layers[2], random_code(), make_sae(), multiplier)
    for row in rows:
        logps = []
        for answer in ("chosen", "rejected"):
            if isinstance(row["prompt"], str):
                prompt, whole = tokenizer(row["prompt"]), tokenizer(row["prompt"] + " " + row[answer] + " <eos>")
                prompt, whole = prompt["input_ids"], whole["input_ids"]
            else:
                chat = row["prompt"] + row[answer]
                rendered = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
                prompt = tokenizer(rendered)["input_ids"]
                whole = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False))["input_ids"]
            assert whole[: len(prompt)] == prompt
            ids = torch.tensor([whole])
            mask = torch.tensor([[0] * len(prompt) + [1] * (len(whole) - len(prompt))])
            with torch.no_grad():
                logps.append(completion_logp(model(ids).logits, ids, mask))
        margins.append(float(logps[0] - logps[1]))
    return torch.tensor(margins)


@pytest.mark.parametrize("conversational", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batched_scores_match_scoring_each_answer_alone(tokenizer, conversational, batch_size):
    rows = preference_rows(7, conversational)
    if not conversational:
        rows = [row | {k: f" {row[k]} " for k in ("chosen", "rejected")} for row in rows]
    scores = sweep(steered(), rows, tokenizer, (-2.0, 0.0, 1.0), batch_size=batch_size)
    assert scores.metrics == ("accuracy", "margin", "margin_per_token")
    assert scores.table["multiplier"].tolist() == [-2.0] * 7 + [0.0] * 7 + [1.0] * 7
    assert scores.table["example"].tolist() == list(range(7)) * 3
    for multiplier, group in scores.table.groupby("multiplier"):
        expected = slow_margins(rows, tokenizer, multiplier)
        assert group["margin"].tolist() == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-3)
        assert group["accuracy"].tolist() == (expected > 0).float().tolist()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("positions", ["all", "completion", "prompt[-2:]"])
def test_lower_layers_run_once_for_all_multipliers(tokenizer, architecture, positions, monkeypatch):
    model = get_peft_model(make_model(architecture), YaPOConfig(layers=2, sae=make_sae(), positions=positions))
    set_code(model, random_code())
    lowest = decoder_blocks(model.get_base_model())[1][0]
    calls = []
    # A hook on the layer would also fire when the layer is skipped; its attention only runs when the layer does.
    attention = getattr(lowest, "self_attn", None) or lowest.attn
    attention.register_forward_hook(lambda *args: calls.append(1))
    multipliers = (-1.0, 0.5, 0.0, 2.0)
    rows = preference_rows(4)
    once = sweep(model, rows, tokenizer, multipliers, batch_size=4)
    # Once for each of the two batches, once to compare the first batch with the whole model, and, to find out
    # whether both answers can share a prompt, three more times.
    checks = 1 + (3 if positions == "all" else 0)
    assert len(calls) == 2 + checks
    monkeypatch.setattr("yapo_peft.scoring.scorer.UpperHalf", None)
    monkeypatch.setattr("yapo_peft.scoring.scorer.lowest_steered", lambda layers: None)
    whole = sweep(model, rows, tokenizer, multipliers, batch_size=4)
    assert len(calls) == 2 + checks + 2 * 4 + (checks - 1)
    torch.testing.assert_close(
        torch.tensor(once.table["margin"].to_numpy()), torch.tensor(whole.table["margin"].to_numpy())
    )


def tokens_run(model, rows, tokenizer, **options):
    """Number of tokens that the last layer ran on at the second multiplier, and the margins."""
    sizes = []
    hook = decoder_blocks(model.get_base_model())[1][3].register_forward_hook(
        lambda module, args, output: sizes.append(hidden_states(output).shape[:2].numel())
    )
    scores = sweep(model, rows, tokenizer, (1.0, -1.0), **options)
    hook.remove()
    return sizes[-1], torch.tensor(scores.table["margin"].to_numpy())


def test_prompt_runs_once_for_both_answers(tokenizer, monkeypatch):
    rows = [row | {"prompt": row["prompt"] * 3} for row in preference_rows(4, conversational=False)]
    tokens, margins = tokens_run(steered(), rows, tokenizer)
    monkeypatch.setattr("yapo_peft.scoring.scorer.attention_window", lambda base: 0)
    tokens_in_rows, expected = tokens_run(steered(), rows, tokenizer)
    assert tokens < 0.75 * tokens_in_rows
    torch.testing.assert_close(margins, expected, rtol=1e-4, atol=1e-4)


def test_prompts_run_twice_with_local_attention(tokenizer, monkeypatch):
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=VOCABULARY, hidden_size=D_MODEL, num_layers=4, num_heads=4, window_size=16,
        max_position_embeddings=128, attention_types=[[["global", "local"], 2]], pad_token_id=0,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(5)  # make the attended tokens matter
    base.config.window_size = 10**6  # as if the model stored its window under another name
    model = get_peft_model(base, YaPOConfig(layers=2, sae=make_sae(), task_type="CAUSAL_LM"))
    set_code(model, random_code())
    # Sharing a row with the chosen answers moves only the longer pairs' rejected answers out of the window.
    rows = [row | {"prompt": row["prompt"] * size} for size in (1, 3) for row in preference_rows(3, False)]
    _, margins = tokens_run(model, rows, tokenizer, batch_size=2)
    monkeypatch.setattr("yapo_peft.scoring.scorer.attention_window", lambda base: 0)
    _, expected = tokens_run(model, rows, tokenizer, batch_size=2)
    torch.testing.assert_close(margins, expected, rtol=1e-4, atol=1e-4)


def test_prompts_run_twice_if_answers_would_see_each_other(tokenizer, monkeypatch):
    def shifted(module, args, output):
        return output + torch.cat([torch.zeros_like(output[:, :1]), output[:, :-1]], dim=1)

    results = []
    for may_share in (True, False):
        model = steered()
        decoder_blocks(model.get_base_model())[1][3].register_forward_hook(shifted)
        if not may_share:
            monkeypatch.setattr("yapo_peft.scoring.scorer.attention_window", lambda base: 0)
        results.append(tokens_run(model, preference_rows(4), tokenizer))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_whole_model_runs_if_upper_layers_read_lower_ones_directly(tokenizer):
    model = steered()
    layers = decoder_blocks(model.get_base_model())[1]
    kept = []
    layers[0].self_attn.register_forward_hook(lambda module, args, output: kept.append(output[0]))
    layers[3].register_forward_hook(lambda module, args, output: output + kept.pop())
    rows, multipliers = preference_rows(4), (1.0, -1.0)
    scores = sweep(model, rows, tokenizer, multipliers)
    for multiplier in multipliers:
        alone = sweep(model, rows, tokenizer, [multiplier])
        found = scores.table[scores.table["multiplier"] == multiplier]["margin"].tolist()
        assert found == pytest.approx(alone.table["margin"].tolist(), abs=1e-4)


def test_sweep_over_an_inactive_adapter(tokenizer):
    model = steered()
    model.add_adapter("other", YaPOConfig(layers=1, space="dense"))
    with torch.no_grad():
        model.base_model.model.model.layers[1].yapo.yapo_code["other"].fill_(0.5)
    rows = preference_rows(3)
    other = sweep(model, rows, tokenizer, (0.0, 1.0), adapter_name="other").table
    assert model.active_adapter == "default"
    model.set_adapter("other")
    assert other.equals(sweep(model, rows, tokenizer, (0.0, 1.0)).table)
    assert other["margin"].nunique() == 6


def test_scores_depend_on_the_steered_positions(tokenizer):
    rows = preference_rows(5)
    everywhere = sweep(steered(), rows, tokenizer, [1.0])
    model = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae(), positions="completion"))
    set_code(model, random_code())
    on_answers = sweep(model, rows, tokenizer, [1.0])
    with model.disable_adapter():
        nowhere = sweep(model, rows, tokenizer, [0.0])
    assert len({round(scores.table["margin"].mean(), 3) for scores in (everywhere, on_answers, nowhere)}) == 3


def test_sweep_restores_mode_and_multiplier(tokenizer):
    model = steered().train()
    before = model.base_model.model.model.layers[2].yapo.multiplier["default"]
    sweep(model, preference_rows(2), tokenizer, [-1.0])
    assert model.training
    assert model.base_model.model.model.layers[2].yapo.multiplier["default"] == before


@pytest.mark.parametrize(
    ("rows", "options", "error", "message"),
    [
        ([], {}, DatasetError, "The dataset is empty"),
        ([{"prompt": "w1", "chosen": "w2"}], {}, DatasetError, r"A pair has no \['rejected'\]"),
        ([{"prompt": "", "chosen": "w2", "rejected": "w3"}], {}, DatasetError, r"A pair has no \['prompt'\]"),
        (preference_rows(1), {"multipliers": []}, ConfigError, r"multipliers=\[\]"),
        (preference_rows(1), {"multipliers": [1.0, 1]}, ConfigError, "without duplicates"),
        (preference_rows(1), {"batch_size": 0}, ConfigError, "batch_size=0"),
        (preference_rows(1), {"multipliers": [1.0, float("nan")]}, ConfigError, "multiplier=nan"),
        (preference_rows(1), {"adapter_name": "x"}, ConfigError, "no YaPO adapter 'x'"),
        (preference_rows(1), {"max_new_tokens": 3}, ConfigError, "max_new_tokens= is only supported"),
    ],
)
def test_invalid_arguments_raise(tokenizer, rows, options, error, message):
    with pytest.raises(error, match=message):
        sweep(steered(), rows, tokenizer, **options)
