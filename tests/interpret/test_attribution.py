import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from tiny import make_model, make_sae, preference_rows, random_code, set_code

from yapo_peft import ConfigError, DatasetError, YaPOConfig, sweep
from yapo_peft.interpret import attribute
from yapo_peft.tuner.adapters import steered_layers


def steered(architecture="llama", layers=(1, 2), density=0.6, **config):
    saes = [make_sae(seed=seed, **config.pop("sae", {})) for seed, _ in enumerate(layers)]
    model = get_peft_model(make_model(architecture), YaPOConfig(layers=list(layers), sae=saes, **config))
    for seed, layer in enumerate(steered_layers(model)):
        layer.yapo_code["default"].data.copy_(random_code(density, seed=seed))
    return model


def effect_of(model, pairs, tokenizer, multiplier):
    """The change of the mean margin, measured with `sweep`."""
    table = sweep(model, pairs, tokenizer, [0.0, multiplier]).summary().set_index("multiplier")["margin"]
    return table[multiplier] - table[0.0]


CASES = pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {}),
        ("gpt2", {"layers": (2,)}),
        ("gemma3", {"layers": (0, 3)}),
        ("llama", {"positions": "completion"}),
        ("llama", {"sae": {"kind": "topk"}}),
        ("llama", {"sae": {"normalize_activations": "layer_norm"}}),
    ],
)


@CASES
@pytest.mark.parametrize("multiplier", [1.0, -0.7])
@pytest.mark.feature("Reading", "`attribute`: the contribution of each feature to the margin")
def test_left_out_matches_setting_entry_to_zero(architecture, options, multiplier, pairs, tokenizer):
    model = steered(architecture, **options)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = attribute(model, pairs, tokenizer, multiplier=multiplier, top=4, steps=1, batch_size=6)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    effect = effect_of(model, pairs, tokenizer, multiplier)
    assert found.effect == pytest.approx(effect, abs=1e-3)
    assert found.pairs == len(pairs)
    layers = {layer.index: layer for layer in steered_layers(model)}
    measured = found.features.dropna(subset="left_out")
    assert len(measured) == 4
    for row in measured.itertuples():
        code = layers[row.layer].yapo_code["default"].data
        entry = code[row.feature].clone()
        assert float(entry) == pytest.approx(row.value)
        code[row.feature] = 0
        assert row.left_out == pytest.approx(effect - effect_of(model, pairs, tokenizer, multiplier), abs=2e-3)
        code[row.feature] = entry
    for index, layer in layers.items():
        code = layer.yapo_code["default"].data
        kept = torch.zeros_like(code)
        here = torch.tensor(measured.loc[measured["layer"] == index, "feature"].tolist(), dtype=torch.long)
        kept[here] = code[here]
        code.copy_(kept)
    assert found.rest == pytest.approx(effect - effect_of(model, pairs, tokenizer, multiplier), abs=2e-3)
    assert found.interaction == pytest.approx(found.effect - measured["left_out"].sum() - found.rest)


@CASES
def test_integrated_gradients_match_autograd(architecture, options, tokenizer):
    pairs = Dataset.from_list(preference_rows()[:3])
    model = steered(architecture, **options)
    found = attribute(model, pairs, tokenizer, multiplier=0.8, top=1, steps=3)
    layers = steered_layers(model)
    codes = [layer.yapo_code["default"] for layer in layers]
    expected = [torch.zeros_like(code) for code in codes]
    values = [code.detach().clone() for code in codes]
    model.requires_grad_(False)
    for code in codes:
        code.requires_grad_(True)
    for step in range(3):
        multiplier = (step + 0.5) / 3
        for code, value in zip(codes, values, strict=True):
            code.data.copy_(multiplier * value)
        gradients = torch.autograd.grad(margins(model, pairs, tokenizer, 0.8).mean(), codes)
        for own, gradient, value in zip(expected, gradients, values, strict=True):
            own += gradient * value / 3
    for layer, own in zip(layers, expected, strict=True):
        rows = found.features[found.features["layer"] == layer.index]
        measured = torch.zeros_like(own)
        measured[torch.tensor(rows["feature"].tolist())] = torch.tensor(rows["integrated"].tolist())
        torch.testing.assert_close(measured, own.detach(), atol=1e-4, rtol=1e-3)


def margins(model, pairs, tokenizer, multiplier):
    """Margins with gradients for the code, from the whole model, one answer at a time."""
    from yapo_peft import steering
    from yapo_peft.scoring.pairs import pair_batches

    found = []
    for batch in pair_batches(pairs, tokenizer, 1):
        sums = []
        for ids, mask, answer in zip(batch["input_ids"], batch["attention_mask"], batch["answer_mask"], strict=True):
            ids, answer = ids[mask.bool()][None], answer[mask.bool()].bool()
            labels = ids.masked_fill(~answer, -100)
            with steering(model, multiplier):
                logits = model(input_ids=ids, labels=labels).logits[0, :-1].log_softmax(-1)
            sums.append(logits.gather(-1, ids[0, 1:, None]).squeeze(-1)[answer[1:]].sum())
        found.append(sums[0] - sums[1])
    return torch.stack(found)


def test_integration_error_decreases_with_steps(pairs, tokenizer):
    model = steered(layers=(2,), density=0.3)
    errors = [abs(attribute(model, pairs, tokenizer, top=1, steps=steps).integration_error) for steps in (1, 64)]
    effect = attribute(model, pairs, tokenizer, top=1, steps=1).effect
    assert errors[1] < 0.02 * abs(effect)
    assert errors[1] < errors[0]


def test_rest_is_zero_if_all_features_are_ablated(pairs, tokenizer):
    model = steered(layers=(2,), density=0.05)
    found = attribute(model, pairs, tokenizer, top=1000, steps=1)
    assert found.features["left_out"].notna().all()
    assert found.rest == pytest.approx(0.0, abs=1e-4)


def test_dense_vector_counts_as_one_feature_per_layer(pairs, tokenizer):
    model = get_peft_model(make_model(), YaPOConfig(layers=[1, 2], space="dense"))
    set_code(model, torch.randn(32, generator=torch.Generator().manual_seed(0)))
    found = attribute(model, pairs, tokenizer, top=2, steps=64)
    assert found.features["feature"].isna().all()
    assert found.effect == pytest.approx(effect_of(model, pairs, tokenizer, 1.0), abs=1e-3)
    assert abs(found.integration_error) < 0.05 * abs(found.effect)
    assert found.rest == pytest.approx(0.0, abs=1e-4)


def test_errors_name_bad_arguments(pairs, tokenizer):
    model = steered(layers=(2,))
    with pytest.raises(ConfigError, match="steps=0: must be a whole number, at least 1"):
        attribute(model, pairs, tokenizer, steps=0)
    with pytest.raises(ConfigError, match="multiplier=0: an adapter has no effect"):
        attribute(model, pairs, tokenizer, multiplier=0)
    with pytest.raises(ConfigError, match="multiplier=inf: must be a finite number"):
        attribute(model, pairs, tokenizer, multiplier=float("inf"))
    with pytest.raises(ConfigError, match="adapter_name='other'"):
        attribute(model, pairs, tokenizer, adapter_name="other")
    with pytest.raises(ConfigError, match="A pair has 307 tokens, but the model takes at most 256"):
        attribute(model, [{"prompt": "w1 " * 300, "chosen": "w2 " * 6, "rejected": "w3"}], tokenizer)
    with pytest.raises(DatasetError, match=r"A pair is 'prompt'.*\.to_dict\('records'\)"):
        attribute(model, pairs.to_pandas(), tokenizer)
    with pytest.raises(DatasetError, match="The dataset is None"):
        attribute(model, None, tokenizer)
    with model.disable_adapter(), pytest.raises(ConfigError, match="The adapters are disabled"):
        attribute(model, pairs, tokenizer)
    with model.disable_adapter(), pytest.raises(ConfigError, match="The adapters are disabled"):
        sweep(model, pairs, tokenizer)
    set_code(model, torch.zeros(96))
    with pytest.raises(ConfigError, match="All entries of adapter 'default' are zero"):
        attribute(model, pairs, tokenizer)


def test_attribute_works_in_inference_mode_and_without_peft_model(pairs, tokenizer):
    model = steered(layers=(2,))
    expected = attribute(model, pairs, tokenizer, top=2, steps=2)
    with torch.inference_mode():
        found = attribute(model, pairs, tokenizer, top=2, steps=2)
    assert found.features.equals(expected.features)
    plain = make_model()
    plain.add_adapter(YaPOConfig(layers=[2], sae=make_sae()), adapter_name="mine")
    set_code(plain, random_code(0.6, seed=0), "mine")
    assert attribute(plain, pairs, tokenizer, top=2, steps=2).effect == pytest.approx(expected.effect, abs=1e-4)
