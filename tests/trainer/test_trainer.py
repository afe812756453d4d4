import json
from pathlib import Path

import pytest
import torch
from _reference.yapo import add_vector, bidirectional_loss, completion_logp, steer_block
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tiny import (
    ARCHITECTURES,
    CHECKPOINTING,
    D_MODEL,
    make_model,
    make_sae,
    preference_rows,
    random_code,
    trained_codes,
)
from transformers.utils import is_torch_bf16_gpu_available

from yapo_peft import (
    UnsupportedOperationError,
    YaPOConfig,
    YaPOTrainer,
    YaPOTrainingConfig,
)
from yapo_peft.trainer.objective import draw_directions
from yapo_peft.tuner.adapters import steered_layers
from yapo_peft.tuner.hooks import REPEATS_HOOKS


def first_batch(trainer):
    trainer.model.train()
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def published_step(architecture, batch, code, direction, reference, beta=0.1, layer=2, sae=None):
    """Loss and gradient of the published step, on an unwrapped model with full logits; of BiPO's for a dense code."""
    code = code.clone().requires_grad_()
    model = make_model(architecture)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    scored = (batch["input_ids"], batch["completion_mask"])
    with torch.no_grad():
        ref = (
            completion_logp(model(**inputs).logits, *scored)
            if reference == "unsteered"
            else torch.zeros(len(scored[0]))
        )
    blocks = model.transformer.h if architecture == "gpt2" else model.model.layers
    losses = []
    for row_direction in sorted(set(direction.tolist())):
        if len(code) == D_MODEL:
            handle = add_vector(blocks[layer], code, row_direction)
        else:
            handle = steer_block(blocks[layer], code, sae or make_sae(), row_direction)
        logp = completion_logp(model(**inputs).logits, *scored)
        handle.remove()
        pairs = direction == row_direction
        w, lose = (part[pairs] for part in logp.chunk(2))
        ref_w, ref_l = (part[pairs] for part in ref.chunk(2))
        losses.append(bidirectional_loss(w, lose, ref_w, ref_l, row_direction, beta) * pairs.sum())
    loss = sum(losses) / len(direction)
    loss.backward()
    return loss.detach(), code.grad


@pytest.mark.feature("Training", "The published loss and gradient, for each `direction` and `reference`")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("direction", ["batch", "example", "both"])
@pytest.mark.parametrize("reference", ["unsteered", "none"])
@pytest.mark.parametrize("space", ["sae", "dense"])
def test_a_step_has_the_published_loss_and_gradient(build, architecture, direction, reference, space):
    code = random_code(0.3) if space == "sae" else random_code(1.0, D_MODEL)
    adapter = {} if space == "sae" else {"space": "dense", "sae": None}
    trainer = build(architecture, adapter=adapter, code=code, direction=direction, reference=reference, seed=3)
    batch = first_batch(trainer)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradient = steered_layers(trainer.model)[0].yapo_code["default"].grad
    if direction == "both":
        steps = [published_step(architecture, batch, code, sign * torch.ones(4), reference) for sign in (1.0, -1.0)]
        expected, expected_gradient = (sum(parts) / 2 for parts in zip(*steps, strict=True))
    else:
        drawn = draw_directions(4, direction, 3, 0, 0, 0)
        expected, expected_gradient = published_step(architecture, batch, code, drawn, reference)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-4 * float(expected_gradient.abs().max()))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_metrics_refer_to_the_labelled_pair_in_both_directions(build, sign, monkeypatch):
    code = random_code(0.5)
    trainer = build(code=code)
    monkeypatch.setattr(trainer._draws, "next", lambda pairs, step: [sign * torch.ones(pairs)])
    batch = first_batch(trainer)
    trainer.compute_loss(trainer.model, batch)
    logged = {name: sum(values) / len(values) for name, values in trainer._metrics["train"].items()}

    model, sae = make_model(), make_sae()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    scored = (batch["input_ids"], batch["completion_mask"])
    with torch.no_grad():
        ref_w, ref_l = completion_logp(model(**inputs).logits, *scored).chunk(2)
        steer_block(model.model.layers[2], code, sae, sign)
        w, lose = completion_logp(model(**inputs).logits, *scored).chunk(2)
    margin = (w - ref_w) - (lose - ref_l)
    name = "plus" if sign > 0 else "minus"
    expected = {
        "logps/chosen": w.mean(),
        "logps/rejected": lose.mean(),
        "rewards/chosen": 0.1 * (w - ref_w).mean(),
        "rewards/rejected": 0.1 * (lose - ref_l).mean(),
        "rewards/margins": 0.1 * margin.mean(),
        "rewards/accuracies": (margin > 0).float().mean(),
        f"margin/{name}": margin.mean(),
        f"loss/{name}": bidirectional_loss(w, lose, ref_w, ref_l, sign, 0.1),
        "code/nonzero": code.count_nonzero(),
        "code/norm": code.norm(),
    }
    for key, value in expected.items():
        assert logged[key] == pytest.approx(float(value), rel=1e-3, abs=1e-4), key
    other = "minus" if sign > 0 else "plus"
    assert f"margin/{other}" not in logged
    assert 0 < logged["code/tokens_moved"] <= 1


@pytest.mark.feature("Training", "Evaluation at fixed signs")
def test_evaluation_uses_fixed_signs(build, pairs, tokenizer):
    code = random_code(0.5)
    trainer = build(code=code, init={"eval_dataset": pairs}, per_device_eval_batch_size=3)
    measured = trainer.evaluate()
    assert measured == {**trainer.evaluate(), **{k: v for k, v in measured.items() if "runtime" in k or "second" in k}}

    hits, losses = {}, []
    batch = trainer.data_collator([trainer.eval_dataset[i] for i in range(len(pairs))])
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    scored = (batch["input_ids"], batch["completion_mask"])
    for sign, name in ((0.0, "zero"), (1.0, "plus"), (-1.0, "minus")):
        model = make_model()
        if sign:
            steer_block(model.model.layers[2], code, make_sae(), sign)
        with torch.no_grad():
            w, lose = completion_logp(model(**inputs).logits, *scored).chunk(2)
        if sign == 0:
            reference = (w, lose)
        else:
            losses.append(bidirectional_loss(w, lose, *reference, sign, 0.1))
        hits[name] = float((w > lose).float().mean())
    assert {name: measured[f"eval_accuracy/{name}"] for name in hits} == pytest.approx(hits)
    assert measured["eval_loss"] == pytest.approx(float(sum(losses) / 2), rel=1e-4)


EXACT = ("loss", "loss/plus", "loss/minus", "margin/plus", "margin/minus", "accuracy/plus", "accuracy/zero")


def test_evaluation_does_not_depend_on_batches(build, pairs):
    results = []
    for size in (1, 3, 8):
        trainer = build(code=random_code(0.5), init={"eval_dataset": pairs}, per_device_eval_batch_size=size)
        results.append([trainer.evaluate()[f"eval_{name}"] for name in EXACT])
        assert results[-1][0] == pytest.approx((results[-1][1] + results[-1][2]) / 2)
    for result in results[1:]:
        assert result == pytest.approx(results[0], rel=1e-4, abs=1e-5)


def test_metrics_are_reported_per_evaluation_dataset(build, pairs):
    first, second = pairs.select(range(5)), pairs.select(range(5, 8))
    trainer = build(code=random_code(0.5), init={"eval_dataset": {"a": first, "b": second}})
    together, alone = trainer.evaluate(), build(code=random_code(0.5), init={"eval_dataset": first}).evaluate()
    assert [together[f"eval_a_{name}"] for name in EXACT] == pytest.approx([alone[f"eval_{name}"] for name in EXACT])
    assert together["eval_b_margin/plus"] != together["eval_a_margin/plus"]
    assert "eval_margin/plus" not in together
    assert trainer.evaluate(first, metric_key_prefix="test")["test_margin/plus"] == alone["eval_margin/plus"]


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")
def test_predict_leaves_no_metrics_behind(build, pairs):
    trainer = build(code=random_code(0.5), init={"eval_dataset": pairs.select(range(3))})
    before = trainer.evaluate()
    predicted = trainer.predict(trainer.train_dataset).metrics
    assert predicted["test_margin/plus"] != before["eval_margin/plus"]
    after = trainer.evaluate()
    assert [after[f"eval_{name}"] for name in EXACT] == [before[f"eval_{name}"] for name in EXACT]


@pytest.mark.parametrize("direction", ["batch", "example", "both"])
def test_tokens_are_counted_once(build, direction):
    trainer = build(direction=direction)
    batch = first_batch(trainer)
    trainer.compute_loss(trainer.model, batch)
    assert trainer._metrics["train"]["num_tokens"] == [int(batch["attention_mask"].sum())]


@pytest.mark.feature("Training", "Resuming from a checkpoint, bit for bit")
@pytest.mark.parametrize("direction", ["batch", "example", "both"])
def test_resuming_gives_the_same_codes_bit_for_bit(build, direction):
    options = {
        "direction": direction,
        "max_steps": 6,
        "save_steps": 3,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
    }
    whole = build(**options)
    whole.train()
    assert trained_codes(whole).any()
    resumed = build(**options)
    resumed.train(resume_from_checkpoint=str(Path(resumed.args.output_dir) / "checkpoint-3"))
    assert torch.equal(trained_codes(resumed), trained_codes(whole))


def test_training_lowers_the_loss_and_only_changes_the_code(build, pairs):
    trainer = build(max_steps=40, direction="both", learning_rate=0.3)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "yapo" not in n}
    first = trainer.evaluate(pairs)["eval_loss"]
    trainer.train()
    after = trainer.evaluate(pairs)
    assert after["eval_loss"] < first - 0.02
    assert after["eval_margin/plus"] > 0 > after["eval_margin/minus"]
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if n in before)


@pytest.mark.feature(
    "Training",
    "TRL's options: accumulation, checkpointing, precomputed reference, bf16, `loss_type`s, `ld_alpha`, ...",
)
@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {CHECKPOINTING: True},
        {"precompute_ref_log_probs": True},
        {"bf16": True},
        {"loss_type": ["ipo"]},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 0.2]},
        {"loss_type": ["aot"], "direction": "both"},
        {"ld_alpha": 0.5, "reference": "none"},
        {"use_weighting": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_of_trl_work(build, options, pairs):
    if CHECKPOINTING in options and REPEATS_HOOKS:
        with pytest.raises(UnsupportedOperationError, match="runs the hooks of a layer again"):
            build(**options)
        return
    trainer = build(**options)
    trainer.train()
    assert trained_codes(trainer).any()
    assert trained_codes(trainer).dtype == torch.float32
    assert 0 <= trainer.evaluate(pairs)["eval_accuracy/zero"] <= 1


def test_precomputed_and_live_references_agree(build):
    live, precomputed = build(direction="both"), build(direction="both", precompute_ref_log_probs=True)
    live.train()
    precomputed.train()
    torch.testing.assert_close(trained_codes(live), trained_codes(precomputed), rtol=1e-4, atol=1e-5)


@pytest.mark.feature("Training", "Conversational and plain pairs, streaming or not")
@pytest.mark.parametrize("conversational", [True, False])
@pytest.mark.parametrize("streaming", [True, False])
def test_dataset_formats(build, conversational, streaming):
    dataset = Dataset.from_list(preference_rows(8, conversational))
    trainer = build(train_dataset=dataset.to_iterable_dataset() if streaming else dataset)
    trainer.train()
    assert trained_codes(trainer).any()


def test_a_model_by_name_with_an_adapter_config(build, tmp_path, pairs, tokenizer):
    make_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    args = YaPOTrainingConfig(
        output_dir=str(tmp_path / "out"), max_steps=2, learning_rate=0.1, warmup_steps=0, report_to="none",
        bf16=False, use_cpu=True, direction="both",
    )  # fmt: skip
    config = YaPOConfig(layers=[1, 2], sae=[make_sae(), make_sae()], task_type="CAUSAL_LM")
    trainer = YaPOTrainer(str(tmp_path / "base"), args, train_dataset=pairs, peft_config=config)
    trainer.train()
    trainer.save_model()
    assert trained_codes(trainer).any(dim=1).all()
    loaded = PeftModel.from_pretrained(make_model(), tmp_path / "out")
    assert torch.equal(
        trained_codes(trainer), torch.stack([layer.yapo_code["default"] for layer in steered_layers(loaded)])
    )
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["layers"] == [1, 2]


def test_existing_adapter_of_any_name_is_trained_without_a_copy(build):
    model = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae()), adapter_name="polite")
    trainer = build(model)
    trainer.train()
    assert list(trainer.model.peft_config) == ["polite"]
    assert "add_adapter" not in vars(trainer.model)
    assert steered_layers(trainer.model)[0].yapo_code["polite"].any()


def test_published_hyper_parameters(tmp_path):
    args = YaPOTrainingConfig.published(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    assert (args.learning_rate, args.learning_rate_unit, args.adam_epsilon, args.max_kl) == (5e-4, "raw", 1e-8, None)
    published = (20, 4, "cosine", 100, 0.1, 0.0, "batch", "unsteered", ["sigmoid"])
    names = "num_train_epochs per_device_train_batch_size lr_scheduler_type warmup_steps beta weight_decay"
    names = [*names.split(), "direction", "reference", "loss_type"]
    assert tuple(getattr(args, name) for name in names) == published
    assert not getattr(args, CHECKPOINTING)
    # Also without use_cpu, on a machine whose accelerator has no bf16 or that has none.
    assert YaPOTrainingConfig(output_dir=str(tmp_path), report_to="none").bf16 == is_torch_bf16_gpu_available()
    assert args.optim.value.startswith("adamw")
