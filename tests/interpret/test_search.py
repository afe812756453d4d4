"""Finding features that an adapter does not steer yet."""

import pytest
import torch
from peft import get_peft_model
from tiny import D_SAE, make_model, make_sae

from yapo_peft import ConfigError, YaPOConfig
from yapo_peft.interpret import find_features
from yapo_peft.scoring import neutral as neutral_text

TEXT = "w1 w9 w3 w9"


@pytest.fixture
def model():
    saes = [make_sae(seed=0), make_sae("topk", seed=1)]
    model = get_peft_model(make_model(), YaPOConfig(layers=[1, 2], sae=saes))
    model.add_adapter("dense", YaPOConfig(layers=1, space="dense"))
    return model.eval()


@pytest.mark.feature("Reading", "`find_features`: features of an SAE by number, text or label")
@torch.no_grad()
def test_features_are_those_more_active_on_the_text_than_usually(model, tokenizer, monkeypatch):
    neutral = ["w1 w2 w3", "w9 w1 w5 w6 w7", *(f"w{word} w3 w1" for word in range(10))]
    monkeypatch.setattr(neutral_text, "packaged_text", lambda: neutral)
    found = find_features(model, TEXT, tokenizer=tokenizer, top=3)
    plain = make_model()
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]

    def activations(text, layer, sae):
        tokens = tokenizer(text, return_tensors="pt")["input_ids"]
        return sae.encode(plain(tokens, output_hidden_states=True).hidden_states[layer + 1][0, 1:])

    for layer, sae in ((1, make_sae(seed=0)), (2, make_sae("topk", seed=1))):
        rows = found[found["layer"] == layer]
        usual = torch.cat([activations(text, layer, sae) for text in neutral]).mean(0)
        features = activations(TEXT, layer, sae)
        largest = features.max(0).values
        best = (largest / (usual + usual.mean())).topk(3)
        assert rows["feature"].tolist() == best.indices.tolist()
        assert rows["feature"].tolist() != largest.topk(3).indices.tolist()
        assert rows["ratio"].tolist() == pytest.approx(best.values.tolist(), rel=1e-4)
        assert rows["activation"].tolist() == pytest.approx(largest[best.indices].tolist(), rel=1e-4)
        places = 1 + features[:, rows["feature"].tolist()].argmax(0)
        assert rows["token"].tolist() == [tokenizer.decode([int(ids[0, place])]) for place in places]
    assert all(len(each) == 8 for each in found["promotes"])


def test_features_are_found_by_number(model, tokenizer):
    assert find_features(model, "7", "number", tokenizer=tokenizer)[["layer", "feature"]].values.tolist() == [
        [1, 7],
        [2, 7],
    ]
    assert find_features(model, "2:5", "number", tokenizer=tokenizer)[["layer", "feature"]].values.tolist() == [[2, 5]]


@pytest.mark.parametrize(
    ("query", "by", "name", "message"),
    [
        ("", "text", "default", "query is empty"),
        ("w1", "text", "default", "query='w1' has 1 tokens"),
        ("w1 " * 300, "text", "default", "The query has 300 tokens, but the model takes at most 256"),
        ("a:b", "number", "default", "query='a:b': must be a feature such as 1965"),
        (str(D_SAE), "number", "default", f"must be below d_sae={D_SAE}"),
        ("3:1", "number", "default", r"the adapter steers layers \[1, 2\]"),
        ("1", "number", "dense", "is dense and has no features"),
        (TEXT, "text", "dense", "is dense and has no features"),
        ("cats", "label", "default", "Neuronpedia does not have this SAE"),
        ("cats", "name", "default", "by='name'"),
    ],
)
def test_bad_queries_are_named(model, tokenizer, query, by, name, message):
    with pytest.raises(ConfigError, match=message):
        find_features(model, query, by, adapter_name=name, tokenizer=tokenizer)
