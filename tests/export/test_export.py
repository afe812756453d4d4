"""Constant vectors and exported files, against the adapter and the programs that read them."""

import json

import pytest
import torch
from _reference import yapo as reference
from peft import get_peft_model
from safetensors import safe_open
from tiny import ARCHITECTURES, D_MODEL, make_model, make_sae, random_code, random_ids, set_code

from yapo_peft import ConfigError, UnsupportedOperationError, YaPOConfig, steering
from yapo_peft.export import FORMATS, constant_steering, export_adapter
from yapo_peft.export.constant import adding
from yapo_peft.methods import import_vectors
from yapo_peft.tuner.adapters import steered_layers

TEXTS = [" ".join(f"w{(7 * i + j * j) % 97}" for j in range(12)) for i in range(10)]


def steered(architecture="llama", layers=(1, 2), space="sae", code=None, **options):
    saes = {"sae": [make_sae(seed=seed) for seed, _ in enumerate(layers)]} if space == "sae" else {}
    model = get_peft_model(make_model(architecture), YaPOConfig(layers=list(layers), space=space, **saes, **options))
    set_code(model, random_code(scale=0.5) if code is None else code)
    return model.eval()


def logits(model, multiplier, ids=None):
    with torch.no_grad(), steering(model, multiplier):
        return model(random_ids() if ids is None else ids).logits


@pytest.mark.feature("Exports", "`constant_steering`: one vector per layer, exact or with its measured KL")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("space", "multiplier"), [("sae", 1.5), ("dense", -0.7)])
def test_constant_is_exact_if_shift_is_same_at_every_token(architecture, space, multiplier):
    code = random_code().abs() if space == "sae" else torch.randn(D_MODEL)
    model = steered(architecture, space=space, code=code)
    found = constant_steering(model, multiplier)
    assert found.is_exact
    assert found.kl is None
    assert found.verdict() == f"Exact at multiplier {multiplier:g}."
    with torch.no_grad(), steering(model, 0.0), adding(steered_layers(model), found.vectors):
        constant = model(random_ids()).logits
    torch.testing.assert_close(constant, logits(model, multiplier), rtol=1e-4, atol=1e-4)


def test_approximation_is_mean_shift_with_measured_kl(tokenizer):
    model = steered(layers=(2,))
    found = constant_steering(model, 1.0, TEXTS, tokenizer, batch_size=3)
    (layer,) = steered_layers(model)
    sae, code = layer.yapo_sae["default"], layer.code("default")
    shifts, kls, wanted, possible = [], [], 0.0, 0.0
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        plain = make_model().eval()
        with torch.no_grad():
            h = _layer_output(plain, ids, 2)
            weights = sae.weights(h.device, h.dtype)
            f = weights.encode(h)[0]
            shift = (torch.relu(f + code) - f) @ weights.W_dec
            shifts.append(shift[0, 1:])
            low = code < 0
            lengths = weights.W_dec.norm(dim=1)
            wanted += float((-code[low] * lengths[low]).sum()) * (ids.shape[1] - 1)
            possible += float((torch.minimum(f[0, 1:][:, low], -code[low]) * lengths[low]).sum())
    expected = torch.cat(shifts).mean(dim=0)
    torch.testing.assert_close(found.vectors[2], expected, rtol=1e-4, atol=1e-5)
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        true = logits(model, 1.0, ids)[0].log_softmax(-1)
        with torch.no_grad(), steering(model, 0.0), adding([layer], {2: expected}):
            constant = model(ids).logits[0].log_softmax(-1)
        kls.append((true.exp() * (true - constant)).sum(-1))
    assert found.kl == pytest.approx(float(torch.cat(kls).mean()), rel=1e-3)
    assert found.tokens == sum(len(text.split()) for text in TEXTS)
    assert found.clipped == pytest.approx(1 - possible / wanted, rel=1e-4)
    assert found.lowered == pytest.approx(float((code < 0).sum() / code.count_nonzero()))
    assert "Approximate at multiplier 1" in found.verdict()


def _layer_output(model, ids, index):
    found = {}
    handle = model.model.layers[index].register_forward_hook(
        lambda module, args, output: found.setdefault("h", output[0] if isinstance(output, tuple) else output)
    )
    model(ids)
    handle.remove()
    return found["h"]


@pytest.mark.parametrize("options", [{"positions": "last"}, {"positions": "completion"}])
def test_constant_is_approximate_unless_all_tokens_are_steered(options, tokenizer):
    model = steered(code=random_code().abs(), **options)
    with pytest.raises(ConfigError, match=r"pass texts= \(--text\) to fit and measure"):
        constant_steering(model)
    assert not constant_steering(model, texts=TEXTS, tokenizer=tokenizer).is_exact


@pytest.mark.feature("Exports", "GGUF control vectors, lm-eval's `steered`, Neuronpedia, safetensors, `vec_ep*.pt`")
def test_gguf_has_fields_that_llama_cpp_reads(tmp_path):
    from gguf import GGUFReader

    model = steered(code=random_code().abs())
    found = export_adapter(model, tmp_path / "mine.gguf", "gguf", 2.0)
    reader = GGUFReader(tmp_path / "mine.gguf")
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == "llama"
    assert reader.get_field("controlvector.layer_count").contents() == 2
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    assert set(tensors) == {"direction.1", "direction.2"}
    for index in (1, 2):
        assert torch.equal(tensors[f"direction.{index}"], found.vectors[index])
    with pytest.raises(UnsupportedOperationError, match="steers layer 0"):
        export_adapter(steered(layers=(0,), code=random_code().abs()), tmp_path / "first.gguf", "gguf")
    assert not (tmp_path / "first.gguf").exists()


@pytest.mark.slow
@pytest.mark.parametrize("space", ["sae", "dense"])
def test_lm_eval_steered_model_matches_adapter(tmp_path, tokenizer, space):
    hf_steered = pytest.importorskip("lm_eval.models.hf_steered")
    make_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = steered(space=space, code=random_code().abs())
    export_adapter(model, tmp_path / "steer.pt", "lm-eval", 1.5)
    assert set(torch.load(tmp_path / "steer.pt")) == {"layers.1", "layers.2"}
    theirs = hf_steered.SteeredModel(str(tmp_path / "base"), str(tmp_path / "steer.pt"), device="cpu", dtype="float32")
    with torch.no_grad():
        found = theirs._model_call(random_ids())
    torch.testing.assert_close(found, logits(model, 1.5), rtol=1e-4, atol=1e-4)


def test_neuronpedia_and_safetensors_contain_vectors(tmp_path):
    model = steered(code=random_code().abs())
    found = export_adapter(model, tmp_path / "np.json", "neuronpedia", 1.0, model_id="gemma-2-2b", label="polite")
    bodies = json.loads((tmp_path / "np.json").read_text())
    assert [body["layerNumber"] for body in bodies] == [1, 2]
    assert set(bodies[0]) == {
        "modelId", "layerNumber", "hookType", "vector", "vectorDefaultSteerStrength", "vectorLabel",
    }  # fmt: skip
    assert bodies[0]["vector"] == pytest.approx(found.vectors[1].tolist())
    export_adapter(model, tmp_path / "v.safetensors", "safetensors", 1.0)
    with safe_open(tmp_path / "v.safetensors", "pt") as file:
        assert file.metadata()["verdict"] == "Exact at multiplier 1."
        assert torch.equal(file.get_tensor("block.2"), found.vectors[2])


@pytest.mark.parametrize("space", ["sae", "dense"])
def test_vec_steers_as_adapter_in_published_code(tmp_path, space):
    code = random_code(scale=0.5) if space == "sae" else torch.randn(D_MODEL)
    model = steered(layers=(2,), space=space, code=code)
    assert export_adapter(model, tmp_path / "vec", "vec", -1.5) is None
    file = tmp_path / "vec" / "vec_ep0_layer2.pt"
    published = make_model().eval()
    layer, vector = published.model.layers[2], torch.load(file)
    handle = reference.steer_block(layer, vector, make_sae(), 1.0) if space == "sae" else None
    handle = handle or reference.add_vector(layer, vector, 1.0)
    with torch.no_grad():
        torch.testing.assert_close(published(random_ids()).logits, logits(model, -1.5), rtol=1e-4, atol=1e-4)
    handle.remove()
    other = steered(layers=(2,), space=space, code=torch.zeros(len(code)))
    import_vectors(other, [file])
    torch.testing.assert_close(logits(other, 1.0), logits(model, -1.5))


@pytest.mark.parametrize(
    ("path", "format", "options", "error", "message"),
    [
        ("a.gguf", "onnx", {}, ConfigError, "format='onnx': must be one of 'gguf'"),
        ("a.bin", "gguf", {}, ConfigError, "with the suffix '.gguf'"),
        ("a.pt", "vec", {}, ConfigError, "a folder name without a suffix"),
        ("a.gguf", "gguf", {"multiplier": 0}, ConfigError, "multiplier=0"),
        ("a.gguf", "gguf", {}, ConfigError, "it lowers .* pass texts="),
        ("a.gguf", "gguf", {"texts": TEXTS, "max_kl": 1e-9}, UnsupportedOperationError, "above max_kl=1e-09"),
        ("a.gguf", "gguf", {"texts": ["w1"] * 2}, ConfigError, "pass longer ones"),
        ("a.gguf", "gguf", {"adapter_name": "no"}, ConfigError, "adapter_name='no'"),
    ],
)
def test_failed_export_writes_nothing(tmp_path, tokenizer, path, format, options, error, message):
    with pytest.raises(error, match=message):
        export_adapter(steered(), tmp_path / path, format, tokenizer=tokenizer, **options)
    assert list(tmp_path.iterdir()) == []


def test_constant_steering_leaves_model_unchanged(tmp_path, tokenizer):
    model = steered()
    before = logits(model, 1.0)
    model.train()
    constant_steering(model, -1.0, TEXTS, tokenizer)
    assert model.training
    assert torch.equal(logits(model.eval(), 1.0), before)
    assert set(FORMATS) == {"gguf", "lm-eval", "neuronpedia", "safetensors", "vec"}
