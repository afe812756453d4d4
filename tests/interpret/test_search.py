"""Finding features that an adapter does not steer yet."""

import pytest
import torch
from peft import get_peft_model
from tiny import D_SAE, make_model, make_sae

from yapo_peft import ConfigError, YaPOConfig
from yapo_peft.interpret import find_features

TEXT = "w1 w9 w3 w9"


@pytest.fixture
def model():
    saes = [make_sae(seed=0), make_sae("topk", seed=1)]
    model = get_peft_model(make_model(), YaPOConfig(layers=[1, 2], sae=saes))
    model.add_adapter("dense", YaPOConfig(layers=1, space="dense"))
    return model.eval()


@pytest.mark.feature("Reading", "`find_features`: features of an SAE by number, text or label")
@torch.no_grad()
def test_features_are_those_most_active_on_the_text(model, tokenizer):
    found = find_features(model, TEXT, tokenizer=tokenizer, top=3)
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    hidden = make_model()(ids, output_hidden_states=True).hidden_states
    for layer, sae in ((1, make_sae(seed=0)), (2, make_sae("topk", seed=1))):
        rows = found[found["layer"] == layer]
        features = sae.encode(hidden[layer + 1][0, 1:])
        assert rows["feature"].tolist() == features.max(0).values.topk(3).indices.tolist()
        assert rows["activation"].tolist() == pytest.approx(features.max(0).values.topk(3).values.tolist(), rel=1e-4)
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
