"""Adapters that hold features at values."""

import pytest
import torch
from _reference.yapo import held_forward
from peft import AutoPeftModelForCausalLM, get_peft_model
from tiny import SAE_KINDS, inference_sae, make_model, make_sae, random_ids

from yapo_peft import (
    ConfigError,
    SAEMismatchError,
    UnsupportedOperationError,
    YaPOConfig,
    YaPOTrainer,
    YaPOTrainingConfig,
    calibrate,
    steering,
)
from yapo_peft.export import constant_steering
from yapo_peft.interpret import attribute, compare, explain
from yapo_peft.methods import fit_sas, import_vectors, measure_contrast, prune, set_features
from yapo_peft.tuner.adapters import steered_layers

VALUES = {5: 8.0, 17: 0.0, 40: 0.5}


def clamped(sae=None, layer=2, values=VALUES, **options):
    if "sae_path" not in options:
        options["sae"] = make_sae() if sae is None else sae
    model = get_peft_model(make_model(), YaPOConfig(layers=layer, mode="clamp", **options)).eval()
    set_features(model, {layer: values})
    return model


@pytest.mark.feature("Methods", "`mode='clamp'`: features that are held at values, or turned off")
@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("kind", SAE_KINDS)
@torch.no_grad()
def test_features_are_held_at_their_values(kind, normalize, tmp_path):
    sae = make_sae(kind, **({} if kind == "batchtopk" else {"normalize_activations": normalize}))
    sae = inference_sae(sae, tmp_path)
    (layer,) = steered_layers(clamped(sae))
    h = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    for multiplier in (1.0, 0.5, 2.0, -1.0):
        layer.multiplier["default"] = multiplier
        torch.testing.assert_close(layer(h), held_forward(h, VALUES, sae, multiplier), rtol=1e-4, atol=1e-4)
    layer.multiplier["default"] = torch.tensor([1.0, -0.5])
    rows = [held_forward(h[:1], VALUES, sae, 1.0), held_forward(h[1:], VALUES, sae, -0.5)]
    torch.testing.assert_close(layer(h), torch.cat(rows), rtol=1e-4, atol=1e-4)
    layer.multiplier["default"] = 0.0
    assert layer(h) is h


@torch.no_grad()
def test_values_are_changed_turned_off_and_removed():
    model, ids = clamped(), random_ids()
    base = make_model()(ids).logits
    set_features(model, {2: {5: 3.0, 40: None}})
    assert torch.equal(model(ids).logits, clamped(values={5: 3.0, 17: 0.0})(ids).logits)
    assert not torch.equal(clamped(values={17: 0.0})(ids).logits, base)
    set_features(model, {2: {5: None, 17: None}})
    assert torch.equal(model(ids).logits, base)
    with pytest.raises(ConfigError, match=r"Feature 5 of layer 2 cannot be held at -1\.0: must be 0 or more"):
        set_features(model, {2: {5: -1.0}})


@torch.no_grad()
@pytest.mark.parametrize(("kind", "self_contained"), [("jumprelu", False), ("jumprelu", True), ("topk", True)])
@pytest.mark.filterwarnings("ignore:The adapter's file gets the whole encoder of a TopK SAE .*holds features")
def test_a_saved_adapter_holds_the_same_features(kind, self_contained, tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    inference_sae(make_sae(kind), tmp_path / "sae")
    model = clamped(sae_path=str(tmp_path / "sae"), self_contained=self_contained)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    if self_contained:
        (tmp_path / "sae").rename(tmp_path / "elsewhere")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    for multiplier in (1.0, -1.0):
        with steering(model, multiplier), steering(loaded, multiplier):
            torch.testing.assert_close(loaded(random_ids()).logits, model(random_ids()).logits)
    assert "are held at a value, or turned off" in (tmp_path / "adapter" / "README.md").read_text()


def test_constant_vectors_report_no_lowering(tokenizer):
    found = constant_steering(clamped(), 1.0, ["w1 w2 w3 w4"], tokenizer)
    assert (found.lowered, found.clipped) == (0.0, None)
    assert "holds features at values" in found.verdict()


def test_generate_holds_in_each_step():
    model = clamped(values={5: 30.0})
    generated = model.generate(random_ids(1, 5), max_new_tokens=4, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        whole = model(generated).logits[0, 4:-1]
    assert torch.equal(whole.argmax(-1), generated[0, 5:])


def test_attribution_and_explanation_are_of_held_values(pairs, tokenizer):
    model = clamped(values={5: 8.0, 17: 0.0})
    found = attribute(model, pairs.select(range(4)), tokenizer, steps=32)
    assert float(found.features["integrated"].sum()) == pytest.approx(found.effect, rel=0.05)
    table = explain(model, tokenizer=tokenizer, labels=False).set_index("feature")
    assert table["value"].to_dict() == found.features.set_index("feature")["value"].to_dict() == {5: 8.0, 17: 0.0}
    assert table["reach"].isna().all()
    assert list(table.index) == [17, 5]  # how far turning off moves is not known: it comes first
    assert dict(zip(table["value"], table["effect"], strict=True)) == {8.0: "held", 0.0: "turned off"}
    off = explain(clamped(values={17: 0.0}), tokenizer=tokenizer, labels=False).iloc[0]
    raised = explain(clamped(values={17: 2.0}), tokenizer=tokenizer, labels=False).iloc[0]
    assert off["suppresses"] == raised["promotes"]


def test_what_is_for_codes_that_are_added_is_refused(pairs, tokenizer, tmp_path):
    model = clamped()
    arguments = YaPOTrainingConfig(output_dir=tmp_path, report_to="none", bf16=False)
    model.add_adapter("other", YaPOConfig(layers=2, mode="clamp", sae=make_sae()))
    for refused in (
        lambda: prune(model, 1),
        lambda: calibrate(model, tokenizer),
        lambda: fit_sas(model, measure_contrast(model, pairs.select(range(2)), tokenizer)),
        lambda: compare(model),
        lambda: import_vectors(model, [tmp_path / "vec_ep1_layer2.pt"]),
        lambda: YaPOTrainer(model, arguments, train_dataset=pairs, processing_class=tokenizer),
    ):
        with pytest.raises(ConfigError, match=r"needs mode='add', but adapter 'default' has mode='clamp'"):
            refused()
    with pytest.raises(SAEMismatchError, match="are values, which do not add up"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    with pytest.raises(UnsupportedOperationError, match=r"holds features at values \(mode='clamp'\)"):
        model.merge_adapter(["default"])
    with pytest.raises(UnsupportedOperationError, match="is not trained"):
        model.train()(random_ids())
    with pytest.raises(ConfigError, match="no meaning with space='dense'"):
        YaPOConfig(layers=2, space="dense", mode="clamp")
    with pytest.raises(ConfigError, match="mode='hold'"):
        YaPOConfig(layers=2, sae=make_sae(), mode="hold")
