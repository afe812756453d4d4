"""CAA, SAS and random vectors against slow references of the papers' definitions."""

import copy

import pytest
import torch
from _reference.contrast import answers_read, caa_vector, sas_vector
from accelerate import cpu_offload
from datasets import Dataset
from peft import get_peft_model
from tiny import (
    ARCHITECTURES,
    D_MODEL,
    SAE_KINDS,
    inference_sae,
    make_model,
    make_sae,
    preference_rows,
    random_code,
    set_code,
)
from torch.testing import assert_close
from transformers import AddedToken

from yapo_peft import (
    ConfigError,
    DatasetError,
    UnsupportedOperationError,
    YaPOConfig,
    YaPOTrainer,
    YaPOTrainingConfig,
)
from yapo_peft.methods import fit_caa, fit_random, fit_sas, measure_contrast
from yapo_peft.methods.contrast import _token_weights
from yapo_peft.scoring.pairs import special_tokens
from yapo_peft.tuner.adapters import steered_layers

ROWS = preference_rows(11)


def with_both(architecture="llama", layers=2, saes=None):
    """A model with a dense and a sparse adapter; the sparse one is active and steers."""
    model = get_peft_model(make_model(architecture), YaPOConfig(layers=layers, space="dense"), adapter_name="caa")
    count = len(layers) if isinstance(layers, list) else 1
    saes = saes or [make_sae(seed=seed) for seed in range(count)]
    model.add_adapter("sas", YaPOConfig(layers=layers, sae=saes))
    set_code(model, random_code(), "sas")
    model.set_adapter("sas")
    return model, saes


def code_of(model, name, layer=0):
    return steered_layers(model)[layer].yapo_code[name].detach()


@pytest.mark.feature("Methods", "CAA: the mean difference of activations, over answers or at their last token")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tokens", ["completion", "last"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_caa_matches_reference(architecture, tokens, batch_size, tokenizer):
    model, saes = with_both(architecture)
    contrast = measure_contrast(model, ROWS, tokenizer, tokens=tokens, batch_size=batch_size)
    fit_caa(model, contrast, "caa")
    hidden, _ = answers_read(make_model(architecture), saes[0], ROWS, tokenizer, 2, tokens)
    assert_close(code_of(model, "caa"), caa_vector(hidden), rtol=1e-4, atol=1e-5)
    assert contrast.pairs == len(ROWS)


@pytest.mark.feature("Methods", "SAS: the mean difference of features, filtered by frequency")
@pytest.mark.parametrize(
    ("kind", "tau"), [(kind, tau / 5 if kind == "batchtopk" else tau) for kind in SAE_KINDS for tau in (0.5, 0.7)]
)
def test_sas_matches_reference(kind, tau, tokenizer, tmp_path):
    model, saes = with_both(saes=[inference_sae(make_sae(kind), tmp_path)])
    fit_sas(model, measure_contrast(model, ROWS, tokenizer), tau=tau)
    _, features = answers_read(make_model(), saes[0], ROWS, tokenizer, 2, "completion")
    expected = sas_vector(features, tau)
    assert expected.any()
    assert_close(code_of(model, "sas"), expected, rtol=1e-4, atol=1e-5)


def test_measure_contrast_covers_all_layers_in_one_pass(tokenizer):
    model, saes = with_both(layers=[0, 2])
    contrast = measure_contrast(model, ROWS, tokenizer)
    fit_caa(model, contrast, "caa")
    fit_sas(model, contrast, "sas", tau=0.5)
    for place, layer in enumerate((0, 2)):
        hidden, features = answers_read(make_model(), saes[place], ROWS, tokenizer, layer, "completion")
        assert_close(code_of(model, "caa", place), caa_vector(hidden), rtol=1e-4, atol=1e-5)
        assert_close(code_of(model, "sas", place), sas_vector(features, 0.5), rtol=1e-4, atol=1e-5)


def test_training_continues_from_fitted_code(tokenizer, tmp_path):
    model, _ = with_both()
    fit_sas(model, measure_contrast(model, ROWS, tokenizer))
    before = code_of(model, "sas").clone()
    args = YaPOTrainingConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        learning_rate=1e-3,
        learning_rate_unit="raw",
        warmup_steps=0,
        report_to="none",
        use_cpu=True,
    )
    YaPOTrainer(model, args, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer).train()
    assert 0 < float((code_of(model, "sas") - before).abs().max()) < 0.01


@pytest.mark.parametrize(
    ("answer", "read"),
    [("w1 zebra w2 <eos>", "w1 zebra w2"), ("<bos> w1 w2 <eos> w3", "w1 w2"), ("<turn> w1 <turn> w2", "w1")],
)
def test_answer_weights_skipspecial_tokens(answer, read, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([AddedToken("w99", special=True)])
    ids, expected = (tokenizer(text.replace("<turn>", "w99"))["input_ids"] for text in (answer, read))
    batch = {"input_ids": torch.tensor([[5, 6, *ids]]), "answer_mask": torch.tensor([[0, 0] + [1] * len(ids)])}
    for tokens in ("completion", "last"):
        weights = _token_weights(batch, special_tokens(tokenizer), tokens)
        found = batch["input_ids"][weights > 0].tolist()
        assert found == (expected if tokens == "completion" else expected[-1:])
        assert float(weights.sum()) == pytest.approx(1)


def test_fit_rejects_offloaded_code(tokenizer):
    model, _ = with_both()
    contrast = measure_contrast(model, ROWS, tokenizer)
    cpu_offload(model, execution_device="cpu")
    with pytest.raises(UnsupportedOperationError, match="'caa' is offloaded or sharded"):
        fit_caa(model, contrast, "caa")


def test_last_token_of_plain_text_excludes_eos(tokenizer):
    rows = [{name: text[0]["content"] + " " for name, text in row.items()} for row in preference_rows(3)]
    model, _ = with_both()
    contrast = measure_contrast(model, rows, tokenizer, tokens="last")
    expected = torch.zeros(D_MODEL)
    for row in rows:
        for sign, answer in ((1, "chosen"), (-1, "rejected")):
            ids = torch.tensor([tokenizer(row["prompt"] + row[answer])["input_ids"]])
            with torch.no_grad():
                expected += sign * make_model()(ids, output_hidden_states=True).hidden_states[3][0, -1] / 3
    fit_caa(model, contrast, "caa")
    assert_close(code_of(model, "caa"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.feature("Methods", "Random vectors with an adapter's norm, as a control")
@pytest.mark.parametrize("like", ["caa", "sas"])
def test_random_vector_matches_norm_of_another_adapter(like, tokenizer):
    model, saes = with_both()
    fit_caa(model, measure_contrast(model, ROWS, tokenizer), "caa")
    for seed in (0, 1):
        model.add_adapter(f"random{seed}", YaPOConfig(layers=2, space="dense"))
        fit_random(model, like, f"random{seed}", seed=seed)
    shift = code_of(model, "caa") if like == "caa" else code_of(model, "sas") @ saes[0].W_dec
    first, second = (code_of(model, f"random{seed}") for seed in (0, 1))
    assert_close(first.norm(), shift.norm())
    assert abs(float(torch.cosine_similarity(first, second, dim=0))) < 0.5


def test_measure_contrast_leaves_model_unchanged(tokenizer):
    model, _ = with_both()
    model.train()
    model.requires_grad_(False)
    ids = torch.arange(3, 12)[None]
    expected = model(ids).logits
    measure_contrast(model, ROWS, tokenizer)
    assert model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(ids).logits, expected)


def test_errors_name_bad_arguments(tokenizer):
    model, _ = with_both()
    contrast = measure_contrast(model, ROWS, tokenizer)
    model.add_adapter("other", YaPOConfig(layers=1, space="dense"))
    model.add_adapter("normalised", YaPOConfig(layers=2, sae=make_sae(normalize_activations="layer_norm")))
    model.add_adapter("gated", YaPOConfig(layers=2, sae=make_sae("gated", seed=9)))
    cases = [
        (lambda: measure_contrast(make_model(), ROWS, tokenizer), "LlamaForCausalLM has no YaPO adapter"),
        (lambda: measure_contrast(model, ROWS, tokenizer, tokens="first"), "tokens='first': must be one of"),
        (lambda: measure_contrast(model, ROWS, tokenizer, batch_size=0), "batch_size=0"),
        (lambda: fit_caa(model, contrast), "CAA needs space='dense', but adapter 'sas'"),
        (lambda: fit_sas(model, contrast, "caa"), "SAS needs space='sae', but adapter 'caa'"),
        (lambda: fit_sas(model, contrast, tau=1.5), r"tau=1\.5: must be a fraction"),
        (lambda: fit_sas(model, contrast, tau=0.0), r"tau=0\.0: no feature of layer 2"),
        (
            lambda: fit_caa(model, contrast, "nobody"),
            "adapter_name='nobody': name a YaPO adapter of the model, which has",
        ),
        (lambda: fit_caa(model, contrast, "other"), r"covers layers \[2\], but the adapter steers layer 1"),
        (lambda: fit_sas(model, contrast, "gated"), "does not cover the SAE of adapter 'gated'"),
        (lambda: fit_random(model, "nobody", "caa"), "like='nobody': no such adapter at layer 2"),
        (lambda: fit_random(model, "caa", "sas"), "space='dense'"),
        (lambda: fit_random(model, "caa", "caa"), "like='caa': its code at layer 2 is zero"),
        (lambda: fit_random(model, "normalised", "caa"), "scales the shift token by token"),
    ]
    for call, message in cases:
        with pytest.raises(ConfigError, match=message):
            call()
    for rows, message in (([], "dataset is empty"), ([{"prompt": "a", "chosen": "b"}], "has no")):
        with pytest.raises(DatasetError, match=message):
            measure_contrast(model, rows, tokenizer)


def test_a_token_for_unknown_and_end_of_text_is_special(tokenizer):
    one = copy.deepcopy(tokenizer)
    one.unk_token = one.bos_token = one.eos_token  # as in GPT-2
    assert tokenizer.eos_token_id in special_tokens(one)
    assert tokenizer.unk_token_id not in special_tokens(tokenizer)
