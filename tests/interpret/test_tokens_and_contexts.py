import json

import pytest
import torch
from peft import get_peft_model
from tiny import D_MODEL, DEPTH, make_model, make_sae, random_code, set_code

from yapo_peft import ConfigError, DatasetError, YaPOConfig, steering
from yapo_peft.interpret import contexts, token_effects
from yapo_peft.tuner.adapters import steered_layers

TEXT = "w1 w2 w3 w4 w5 w6"


def steered(layers=(1, 3), density=0.3, positions="all", **options):
    saes = [make_sae(seed=seed, **options) for seed, _ in enumerate(layers)]
    model = get_peft_model(make_model(), YaPOConfig(layers=list(layers), sae=saes, positions=positions))
    for seed, layer in enumerate(steered_layers(model)):
        layer.yapo_code["default"].data.copy_(random_code(density, seed=seed))
    return model, saes


def hidden_of(model, inputs, index):
    """A layer's output before and after steering."""
    found = {}
    layer = model.get_base_model().model.layers[index]
    handles = [
        layer.register_forward_hook(lambda m, a, out: found.setdefault("before", out.detach().clone()), prepend=True),
        layer.register_forward_hook(lambda m, a, out: found.setdefault("after", out.detach().clone())),
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return found["before"][0], found["after"][0]


@pytest.mark.feature("Reading", "`token_effects`: the effect of steering on each token of a prompt")
@pytest.mark.parametrize("multiplier", [1.0, -0.5])
@pytest.mark.parametrize(
    "options", [{}, {"kind": "topk"}, {"normalize_activations": "layer_norm"}], ids=["jumprelu", "topk", "layer_norm"]
)
def test_token_effects_match_model(multiplier, options, tokenizer):
    model, saes = steered(**options)
    found = token_effects(model, TEXT, tokenizer, multiplier=multiplier, top=1000)
    inputs = tokenizer(TEXT, return_tensors="pt")
    for layer, sae in zip(steered_layers(model), saes, strict=True):
        with steering(model, multiplier):
            before, after = hidden_of(model, inputs, layer.index)
        rows = found.tokens[found.tokens["layer"] == layer.index]
        assert rows["token"].tolist() == TEXT.split()
        assert rows["norm"].tolist() == pytest.approx(before.norm(dim=-1).tolist(), rel=1e-4)
        assert rows["moved"].tolist() == pytest.approx((after - before).norm(dim=-1).tolist(), rel=1e-3)
        assert (rows["share"] - rows["moved"] / rows["norm"]).abs().max() < 1e-6
        code = multiplier * layer.yapo_code["default"].detach()
        features = sae.encode(before[None])[0].detach()
        changed = torch.relu(features + code) - features
        expected = {
            "on": (features > 0) & (code != 0),
            "raised": changed > 0,
            "cut": (changed < 0) & (features + code <= 0),
            "lowered": (changed < 0) & (features + code > 0),
        }
        for name, mask in expected.items():
            assert rows[name].tolist() == mask.sum(dim=-1).tolist(), name
        listed = found.features[found.features["layer"] == layer.index]
        assert len(listed) == int((changed != 0).sum())
        for row in listed.itertuples():
            assert row.on == pytest.approx(float(features[row.position, row.feature]), abs=1e-4)
            assert row.change == pytest.approx(float(changed[row.position, row.feature]), abs=1e-4)
            assert expected[row.effect][row.position, row.feature]


def test_token_effects_lists_top_inactive_features(tokenizer):
    model, _ = steered(layers=(2,), density=0.8)
    found = token_effects(model, TEXT, tokenizer, top=2)
    for position, rows in found.features.groupby("position"):
        assert (rows["on"] == 0).sum() == 2
        on = found.tokens.loc[found.tokens["position"] == position, "on"].item()
        assert (rows["on"] > 0).sum() == on


def test_token_effects_of_dense_vector_at_last_token(tokenizer):
    model = get_peft_model(make_model(), YaPOConfig(layers=[2], space="dense", positions="last"))
    set_code(model, torch.ones(D_MODEL))
    moved = token_effects(model, [{"role": "user", "content": TEXT}], tokenizer, multiplier=-2.0).tokens["moved"]
    assert moved.iloc[-1] == pytest.approx(2 * D_MODEL**0.5)
    assert (moved.iloc[:-1] == 0).all()
    with pytest.raises(ConfigError, match="prompt is empty"):
        token_effects(model, "", tokenizer)
    with pytest.raises(ConfigError, match="has 300 tokens, but the model takes at most 256"):
        token_effects(model, "w1 " * 300, tokenizer)
    with pytest.raises(ConfigError, match=r"top=1.5: must be a whole number, at least 0"):
        token_effects(model, "w1", tokenizer, top=1.5)
    with pytest.raises(DatasetError, match="3 is not a text"):
        token_effects(model, 3, tokenizer)


@pytest.mark.parametrize("positions", ["completion", "last"])
def test_token_effects_steers_answer_of_row_as_in_training(positions, tokenizer):
    model, _ = steered(layers=(2,), positions=positions)
    row = {"prompt": "w1 w2 w3 ", "chosen": "w4 w5 w6"}
    moved = token_effects(model, row, tokenizer).tokens["moved"]
    inputs = tokenizer(row["prompt"] + row["chosen"], return_tensors="pt")
    labels = inputs["input_ids"].clone()
    labels[:, :3] = -100
    before, after = hidden_of(model, {**inputs, "labels": labels}, 2)
    assert moved.tolist() == pytest.approx((after - before).norm(dim=-1).tolist(), rel=1e-3)
    assert [move > 0 for move in moved] == [False, False, positions == "last", True, True, True]


@pytest.fixture
def texts():
    generator = torch.Generator().manual_seed(0)
    return [
        " ".join(f"w{i}" for i in torch.randint(0, 100, (3 + n % 7,), generator=generator).tolist()) for n in range(30)
    ]


def values_of(model, texts, tokenizer, sae, layer, features):
    """The activations of features at each token, one text at a time."""
    found = []
    for text in texts:
        with steering(model, 0.0):
            hidden, _ = hidden_of(model, tokenizer(text, return_tensors="pt"), layer)
        found.append(sae.encode(hidden).detach()[:, features])
    return found


@pytest.mark.feature("Reading", "`contexts`: the passages with the highest activations of features")
@pytest.mark.parametrize("skip_sinks", [True, False])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_contexts_finds_highest_activations(skip_sinks, batch_size, texts, tokenizer):
    model, saes = steered(layers=(2,))
    features = [5, 1, 17, 40]
    sink = texts[0].split()[2]
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(sink)] *= 100
    found = contexts(
        model, features, iter(texts), tokenizer, top=3, window=1, skip_sinks=skip_sinks, batch_size=batch_size
    )
    values = values_of(model, texts, tokenizer, saes[0], 2, features)
    if skip_sinks:
        for own, text in zip(values, texts, strict=True):
            own[[place == 0 or word == sink for place, word in enumerate(text.split())]] = 0
    for column, feature in enumerate(features):
        peaks = [(float(own[:, column].max()), -index) for index, own in enumerate(values)]
        best = sorted((peak for peak in peaks if peak[0] > 0), reverse=True)[:3]
        rows = found[found["feature"] == feature]
        assert rows["rank"].tolist() == list(range(1, len(best) + 1))
        assert rows["peak"].tolist() == pytest.approx([peak for peak, _ in best], rel=1e-4)
        assert rows["text"].tolist() == [-minus for _, minus in best]
        for row in rows.itertuples():
            own, words = values[row.text][:, column], texts[row.text].split()
            start = max(0, row.position - 1)
            assert float(own[row.position]) == pytest.approx(row.peak, rel=1e-4)
            assert row.tokens == words[start : row.position + 2]
            assert row.values == pytest.approx(own[start : row.position + 2].tolist(), rel=1e-4, abs=1e-5)


def test_contexts_resumes_interrupted_search(texts, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("yapo_peft.interpret.passages._SAVED_EVERY", 2)
    model, _ = steered(layers=(1, 3))
    features = {3: [1, 2], 1: [5]}
    whole = contexts(model, features, texts, tokenizer, batch_size=3)
    read = []

    def stopping():
        for index, text in enumerate(texts):
            if index == 14:
                raise KeyboardInterrupt
            yield text

    file = tmp_path / "found.json"
    with pytest.raises(KeyboardInterrupt):
        contexts(model, features, stopping(), tokenizer, batch_size=3, resume=file)
    assert json.loads(file.read_text())["done"] == 12

    def rest():
        for text in texts:
            read.append(text)
            yield text

    again = contexts(model, features, rest(), tokenizer, batch_size=3, resume=file)
    assert again.equals(whole)
    assert contexts(model, features, texts, tokenizer, batch_size=3, resume=file).equals(whole)
    with pytest.raises(ConfigError, match="is not a file of this search"):
        contexts(model, {3: [1]}, texts, tokenizer, resume=file)
    for others in (texts[::-1], texts[:20], []):
        with pytest.raises(ConfigError, match="is of other texts"):
            contexts(model, features, others, tokenizer, batch_size=3, resume=file)
    other = get_peft_model(make_model(seed=5), YaPOConfig(layers=[1, 3], sae=[make_sae(seed=0), make_sae(seed=1)]))
    with pytest.raises(ConfigError, match="is not a file of this search"):
        contexts(other, features, texts, tokenizer, batch_size=3, resume=file)
    with pytest.raises(ConfigError, match="must be a file, but is a folder"):
        contexts(model, features, texts, tokenizer, resume=tmp_path)
    file.write_text("nothing")
    with pytest.raises(ConfigError, match="is not a file of this search"):
        contexts(model, features, texts, tokenizer, resume=file)


def test_contexts_does_not_run_upper_layers(texts, tokenizer):
    model, _ = steered(layers=(1,))
    ran = []
    for index, layer in enumerate(model.get_base_model().model.layers):
        layer.register_forward_hook(lambda *args, index=index: ran.append(index), always_call=True)
    contexts(model, [1], texts[:4], tokenizer, batch_size=4)
    assert max(ran) == 1 < DEPTH - 1


def test_errors_name_bad_features(texts, tokenizer):
    model, _ = steered()
    with pytest.raises(ConfigError, match=r"steers layers \[1, 3\]: pass features by layer"):
        contexts(model, [1], texts, tokenizer)
    with pytest.raises(ConfigError, match=r"Features of layer 2: the adapter steers layers \[1, 3\]"):
        contexts(model, {2: [1]}, texts, tokenizer)
    with pytest.raises(ConfigError, match=r"Feature 96 of layer 1: must be below d_sae=96"):
        contexts(model, {1: [96]}, texts, tokenizer)
    with pytest.raises(ConfigError, match="must have at least one feature"):
        contexts(model, {1: []}, texts, tokenizer)
    with pytest.raises(ConfigError, match="top=0"):
        contexts(model, {1: [1]}, texts, tokenizer, top=0)
    dense = get_peft_model(make_model(), YaPOConfig(layers=2, space="dense"))
    with pytest.raises(ConfigError, match="is dense and has no features"):
        contexts(dense, [1], texts, tokenizer)
