"""The budget for the damage of training: the divergence on neutral text, its bound in training, and bad values."""

import json
import math

import pytest
import torch
from accelerate import Accelerator
from cached import HELD_OUT, MANY
from damage import DENSE, TEXT, code_of, codes_of, make_adapter, slow_damage, slow_divergence
from tiny import ARCHITECTURES, make_sae, random_code, set_code, trained_codes

from yapo_peft import ConfigError, YaPOConfig, YaPOTrainingConfig, calibrate
from yapo_peft.scoring.neutral import NeutralText, neutral_rows, packaged_text
from yapo_peft.scoring.upper_half import UpperHalf
from yapo_peft.trainer.budget import DamageBudget


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("upper", "keep"), [(True, True), (False, True), (False, False)])
def test_divergence_and_gradient_are_those_of_whole_passes(tokenizer, architecture, upper, keep):
    model = make_adapter(architecture)
    half = UpperHalf(model.get_base_model(), 2) if upper else None
    text = NeutralText(model, neutral_rows(TEXT, tokenizer), torch.device("cpu"), half, keep)
    for _ in range(2):  # computed, then known
        found = text.divergence(model, [0, 1, 2], torch.tensor([1.0, -1.0, 0.5]))
    expected = [slow_divergence(model, *args) for args in zip(TEXT, [tokenizer] * 3, [1.0, -1.0, 0.5], strict=True)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-6)
    assert float(found.detach().min()) > 1e-7
    code = model.get_parameter(code_of(model))
    gradients = [torch.autograd.grad(kl, code)[0] for kl in (found.sum(), torch.stack(expected).sum())]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)


def test_divergence_steers_the_tokens_of_the_adapter(tokenizer):
    model = make_adapter(positions="completion")
    text = NeutralText(model, neutral_rows(TEXT, tokenizer), torch.device("cpu"), None)
    everywhere = make_adapter()
    expected = [slow_divergence(everywhere, row, tokenizer, 1.0) for row in TEXT]
    torch.testing.assert_close(text.divergence(model, [0, 1, 2], torch.ones(3)), torch.stack(expected))


def test_of_adapters_that_steer_prompts_the_first_half_of_a_text_is_steered(tokenizer):
    """Whatever else is in the batch."""
    model, everywhere = make_adapter(positions="prompt"), make_adapter()
    rows = neutral_rows(TEXT, tokenizer)
    found = NeutralText(model, rows, torch.device("cpu"), None).divergence(model, [0, 1, 2], torch.ones(3)).detach()
    for row, kl in zip(rows, found, strict=True):
        ids = torch.tensor([row])
        labels = ids.masked_fill(torch.arange(len(row)) < len(row) // 2, -100)
        with torch.no_grad():
            steered = model(ids, labels=labels).logits[0].log_softmax(-1)
            with model.disable_adapter():
                base = model(ids).logits[0].log_softmax(-1)
            whole = everywhere(ids).logits[0].log_softmax(-1)
        expected = (base.exp() * (base - steered)).sum(-1)
        assert float(kl) == pytest.approx(float(expected.mean()), rel=1e-3)
        half = len(row) // 2
        torch.testing.assert_close(steered[:half], whole[:half])


def test_what_is_known_of_a_row_depends_on_neither_the_order_nor_the_mode(tokenizer):
    model = make_adapter("gpt2")
    rows = [ids[: 3 + index] for index, ids in enumerate(neutral_rows(TEXT * 2, tokenizer))]

    def known(order):
        text = NeutralText(model, rows, torch.device("cpu"), None)
        for row in order:
            text._of(row)
        return [text._known[row].final for row in range(len(rows))]

    expected = known([0, 4])
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    for one, other in zip(known([5, 3, 2, 0]), expected, strict=True):
        assert torch.equal(one, other)
    assert model.training


def test_packaged_text_starts_with_every_kind():
    rows = packaged_text()
    assert len(rows) >= 400
    kinds = {row["kind"] for row in rows}
    assert {"prose", "chat", "instruction", "question", "code", "language"} == kinds
    assert {row["kind"] for row in rows[:16]} == kinds
    assert len({json.dumps(row) for row in rows}) == len(rows)


def test_chats_are_rendered_by_the_template(tokenizer):
    chat = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert neutral_rows([{"messages": chat}, "w1 w2"], tokenizer) == [ids, tokenizer("w1 w2")["input_ids"]]


@pytest.mark.feature("Training", "`max_kl`: a bound on the damage at multipliers +1 and -1, on neutral text")
@pytest.mark.parametrize("adapter", [{}, DENSE], ids=["sae", "dense"])
@pytest.mark.parametrize("cached", [False, True])
def test_training_stays_within_the_budget(train, adapter, cached, tokenizer):
    options = {"adapter": adapter, "max_steps": 30, "learning_rate": 0.3, "direction": "both"}
    free = train(cached, **options)
    bound = train(cached, **options, max_kl=5e-4, neutral=TEXT)
    damage = bound.model.peft_config["default"].damage
    total = 0.0
    for side, multiplier in (("plus", 1.0), ("minus", -1.0)):
        of_free, of_bound = (
            float(torch.stack([slow_divergence(t.model, row, tokenizer, multiplier) for row in TEXT]).mean().detach())
            for t in (free, bound)
        )
        assert of_free > 2e-3
        total += of_free
        assert of_bound <= 5e-4 * 1.03
        assert damage[side] == pytest.approx(of_bound, rel=1e-3)
    log = [entry for entry in bound.state.log_history if "kl/plus" in entry]
    # Not only scaled at the end: the weight made the last steps stay near the bound.
    assert log[-1]["kl/plus"] + log[-1]["kl/minus"] < total / 2
    assert log[-1]["kl_weight/plus"] > log[0]["kl_weight/plus"]


def test_weights_are_multipliers_times_recent_excess():
    """Against products and sums over all batches so far."""

    class Given:
        def divergence(self, model, rows, multipliers):
            assert multipliers.tolist() == [1.0, -1.0]
            return torch.tensor(series[rows[0]])

    series = [[0.0, 0.3], [0.05, 0.1], [0.5, 0.02], [0.1, 0.1], [0.15, 0.0]]
    budget, state, accelerator = DamageBudget(Given(), 0.1), {}, Accelerator(cpu=True)
    for number, divergences in enumerate(series):
        loss, metrics = budget.penalty(None, number, state, accelerator)
        # As in a checkpoint.
        state = json.loads(json.dumps(state))
        expected = 0.0
        for side, name in enumerate(("plus", "minus")):
            ratios = [row[side] / 0.1 for row in series[: number + 1]]
            multiplier = 0.3 * math.prod(math.exp(0.1 * min(ratio - 1, 1)) for ratio in ratios[:-1])
            average = ratios[0] * 0.8**number
            average += sum(0.2 * 0.8 ** (number - step) * ratios[step] for step in range(1, number + 1))
            assert metrics[f"kl_weight/{name}"] == pytest.approx(multiplier * average)
            assert metrics[f"kl/{name}"] == pytest.approx(divergences[side])
            expected += multiplier * average * divergences[side]
        assert float(loss) == pytest.approx(expected, abs=1e-7)


def test_training_reads_64_tokens_of_a_row_and_the_record_128(build, tokenizer):
    row = " ".join([f"w{number}" for number in range(64)] + ["w5"] * 56)
    trainer = build(model=make_adapter(), max_steps=1, max_kl=10.0, neutral=[row], learning_rate=0.0)
    trainer.train()
    assert len(tokenizer(row)["input_ids"]) == 120
    for side, multiplier in (("plus", 1.0), ("minus", -1.0)):
        start, whole = (
            float(slow_divergence(trainer.model, text, tokenizer, multiplier).detach())
            for text in (" ".join(row.split()[:64]), row)
        )
        assert abs(start - whole) > 0.01 * whole
        assert trainer.state.log_history[0][f"kl/{side}"] == pytest.approx(start, rel=1e-3)
        assert trainer.model.peft_config["default"].damage[side] == pytest.approx(whole, rel=1e-3)


def test_cached_training_takes_the_same_steps_with_a_budget(train):
    options = {"max_kl": 0.01, "neutral": TEXT, "max_steps": 3}
    codes = [trained_codes(train(cached, **options)) for cached in (False, True)]
    torch.testing.assert_close(codes[0], codes[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", [{"loss_type": "reps"}, {"direction": "example"}])
def test_budget_works_with_other_losses_and_directions(build, loss):
    trainer = build(max_steps=2, max_kl=0.01, neutral=TEXT, **loss)
    trainer.train()
    first, second = (entry["kl/plus"] for entry in trainer.state.log_history[:2])
    assert 0 < first != second > 0


@pytest.mark.parametrize("frozen", [False, True])
def test_each_of_several_adapters_has_its_own_damage(build, tokenizer, frozen):
    model = make_adapter()
    config = {} if frozen else {"layers": 3}
    model.add_adapter("other", YaPOConfig(**{"layers": 2, "sae": make_sae(), **config}))
    set_code(model, random_code(seed=9, scale=0.3), "other")
    model.base_model.set_adapter(["default", "other"])
    default, other = (model.get_parameter(name) for name in codes_of(model))
    default.requires_grad_(not frozen)
    before = default.detach().clone()
    bound = max(slow_damage(model, tokenizer).values()) * (2 if frozen else 0.5)
    build(model, max_steps=1, max_kl=bound, neutral=TEXT, learning_rate=0.0).train()
    assert torch.equal(default, before) == frozen
    assert max(slow_damage(model, tokenizer).values()) <= bound * 1.02
    trained = ["other"] if frozen else ["default", "other"]
    assert [name for name in ("default", "other") if model.peft_config[name].damage is not None] == trained
    for name in trained:
        damage = slow_damage(model, tokenizer, adapter_name=name)
        assert model.peft_config[name].damage == pytest.approx(damage, rel=1e-3)
    assert other.requires_grad


def test_damage_is_forgotten_when_training_starts(build, tokenizer):
    model = make_adapter()
    calibrate(model, tokenizer, 0.005, dataset=TEXT)
    build(model, max_steps=1).train()
    assert model.peft_config["default"].damage is None


def test_a_bound_that_the_trained_codes_cannot_keep_is_said(build, tokenizer):
    model = make_adapter()
    model.add_adapter("other", YaPOConfig(layers=2, sae=make_sae()))
    model.base_model.set_adapter(["default", "other"])
    model.get_parameter(codes_of(model)[0]).requires_grad_(False)
    trainer = build(model, max_steps=1, max_kl=1e-5, neutral=TEXT)
    with pytest.warns(UserWarning, match="which no smaller scale of the trained codes brings down"):
        trainer.train()
    assert model.get_parameter(codes_of(model)[1]).any()


@pytest.mark.parametrize("max_kl", [0.0, -1.0, float("inf"), float("nan"), True, "0.1"])
def test_config_rejects_bad_bounds(max_kl, tmp_path):
    with pytest.raises(ConfigError, match=r"max_kl=.*: must be a positive number of nats per token"):
        YaPOTrainingConfig(output_dir=str(tmp_path), max_kl=max_kl, use_cpu=True)


def test_neutral_text_without_a_bound_is_rejected(build):
    with pytest.raises(ConfigError, match="neutral_dataset is only read with max_kl or max_features"):
        build(neutral=TEXT, train_dataset=MANY)


def test_a_run_goes_on_in_the_same_trainer(build, tmp_path):
    options = {"train_dataset": MANY, "direction": "example", "max_steps": 4, "save_steps": 3, "max_kl": 0.01}
    trainer = build(**options, neutral=TEXT)
    trainer.train()
    expected = trained_codes(trainer).clone()
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert torch.equal(trained_codes(trainer), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"max_kl": 1e-3, "neutral": TEXT, "learning_rate": 10.0},
        {"load_best_model_at_end": True, "greater_is_better": True, "save_strategy": "best"},
    ],
)
def test_the_last_evaluation_is_of_the_final_codes(build, options):
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "init": {"eval_dataset": HELD_OUT}}
    trainer = build(train_dataset=MANY, max_steps=6, **evaluated, **options)
    trainer.train()
    last = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(last) == 4
    assert last[-1]["eval_loss"] != last[-2]["eval_loss"]
    assert last[-1]["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"])
