import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pandas as pd
import pytest
import torch
from peft import get_peft_model
from tiny import ARCHITECTURES, D_MODEL, D_SAE, VOCABULARY, make_model, make_sae, random_code, set_code

from yapo_peft import ConfigError, DatasetError, YaPOConfig
from yapo_peft.interpret import explain
from yapo_peft.interpret.neuronpedia import neuronpedia_labels, neuronpedia_search
from yapo_peft.sae import SAEIdentity
from yapo_peft.tuner.adapters import steered_layers

TEXTS = ["w1 w2 w3 w4", {"text": "w9 w8"}, {"prompt": "w5 ", "chosen": "w6"}, "w7 w1 w1"]


def steered(architecture="llama", layers=(1, 2), density=0.4, **options):
    saes = [make_sae(seed=seed, **options) for seed, _ in enumerate(layers)]
    model = get_peft_model(make_model(architecture), YaPOConfig(layers=list(layers), sae=saes))
    for seed, layer in enumerate(steered_layers(model)):
        layer.yapo_code["default"].data.copy_(random_code(density, seed=seed))
    return model, saes


@pytest.mark.feature("Reading", "`explain`: the features of an adapter, and the tokens they promote")
@pytest.mark.parametrize("multiplier", [1.0, -2.0])
def test_explain_lists_features_of_code(multiplier, tokenizer):
    model, saes = steered()
    table = explain(model, tokenizer=tokenizer, multiplier=multiplier, top=None)
    for layer, sae in zip(steered_layers(model), saes, strict=True):
        rows = table[table["layer"] == layer.index]
        code = layer.yapo_code["default"].detach()
        assert sorted(rows["feature"]) == code.nonzero().squeeze(-1).tolist()
        index = torch.tensor(rows["feature"].tolist())
        norms = sae.W_dec.detach().norm(dim=1)[index]
        assert rows["value"].tolist() == pytest.approx(code[index].tolist())
        assert rows["decoder_norm"].tolist() == pytest.approx(norms.tolist(), rel=1e-5)
        assert rows["reach"].tolist() == pytest.approx((multiplier * code[index]).abs().mul(norms).tolist(), rel=1e-5)
        assert rows["reach"].is_monotonic_decreasing
        is_raised = [value * multiplier > 0 for value in rows["value"]]
        assert [effect == "constant" for effect in rows["effect"]] == is_raised
        assert (rows["acts"] == 1).tolist() == is_raised
        assert rows["on"].isna().all()
    assert table["label"].isna().all()
    shown = explain(model, tokenizer=tokenizer, multiplier=multiplier, top=3)
    assert shown["layer"].tolist() == [1, 1, 1, 2, 2, 2]
    assert shown.dtypes.to_dict() == table.dtypes.to_dict()


@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
def test_explain_counts_active_tokens(kind, tokenizer):
    model, saes = steered(layers=(2,), kind=kind)
    table = explain(model, tokenizer=tokenizer, texts=iter(TEXTS), batch_size=3, top=20)
    base, on, total = make_model(), torch.zeros(D_SAE), 0
    for text in ["w1 w2 w3 w4", "w9 w8", "w5 w6", "w7 w1 w1"]:
        hidden = base(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states[3]
        on += (saes[0].encode(hidden.detach()) > 0).sum(dim=(0, 1))
        total += hidden.shape[1]
    expected = (on / total)[torch.tensor(table["feature"].tolist())]
    assert table["on"].tolist() == pytest.approx(expected.tolist())
    lowered = table["effect"] == "input-dependent"
    assert table["acts"][lowered].tolist() == table["on"][lowered].tolist()
    assert (table["acts"][~lowered] == 1).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_promoted_tokens_use_final_norm_and_head(architecture, tokenizer):
    model, saes = steered(architecture, layers=(2,))
    with torch.no_grad():
        for norm in [m for n, m in model.named_modules() if n.endswith((".norm", "ln_f"))]:
            norm.weight.uniform_(0.2, 3)
            if getattr(norm, "bias", None) is not None:
                norm.bias.normal_()
    row = explain(model, tokenizer=tokenizer, top=1, tokens=VOCABULARY).iloc[0]
    decoder = model.get_base_model().get_decoder()
    norm = decoder.ln_f if architecture == "gpt2" else decoder.norm
    direction = row["value"] * saes[0].W_dec.detach()[row["feature"]]
    with torch.no_grad():
        zero = torch.zeros(1, D_MODEL)
        moved = norm(1000 * direction[None]) - norm(zero)
        logits = (model.get_output_embeddings()(moved) - model.get_output_embeddings()(zero))[0]
    assert row["promotes"] == [tokenizer.decode([i]) for i in logits.argsort(descending=True).tolist()]
    assert row["suppresses"] == row["promotes"][::-1]


def test_dense_vector_is_one_row_per_layer(tokenizer):
    model = get_peft_model(make_model(), YaPOConfig(layers=[1, 2], space="dense"))
    set_code(model, torch.ones(D_MODEL))
    table = explain(model, tokenizer=tokenizer, texts=TEXTS, multiplier=-1.0)
    assert table["layer"].tolist() == [1, 2]
    assert table["feature"].isna().all()
    assert table["value"].tolist() == pytest.approx([D_MODEL**0.5] * 2)
    assert set(table["effect"]) == {"constant"}


def test_explain_selects_features(tokenizer):
    model, _ = steered(layers=(2,))
    moved = steered_layers(model)[0].yapo_code["default"].nonzero().squeeze(-1).tolist()
    still = next(feature for feature in range(D_SAE) if feature not in moved)
    found = explain(model, tokenizer=tokenizer, features=[moved[5], still, moved[0]])
    assert sorted(found["feature"]) == sorted([moved[5], moved[0]])
    assert explain(model, tokenizer=tokenizer, features={2: moved[:3]}, top=1)["feature"].count() == 3


def test_explain_is_empty_for_zero_code(tokenizer):
    model = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae()))
    assert explain(model, tokenizer=tokenizer).empty


@pytest.fixture
def neuronpedia(monkeypatch, tmp_path):
    """A server that responds like Neuronpedia; yields the paths requested."""
    requested = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requested.append(self.path)
            feature = int(self.path.rpartition("/")[2])
            if feature == 13:
                self.send_error(500)
                return
            content = {"explanations": [{"description": f" about {feature} "}] if feature != 7 else []}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def do_POST(self):
            requested.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"results": [{"index": "9"}, {"index": "4"}, {"index": "9"}]}).encode())

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("YAPO_NEURONPEDIA", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    yield requested
    server.shutdown()
    server.server_close()
    thread.join()


GEMMA = SAEIdentity(
    "gemma-scope-2b-pt-res-canonical", "layer_20/width_16k/canonical", 2304, 16384, "jumprelu", "0" * 64
)


def test_labels_are_searched(neuronpedia, monkeypatch):
    assert neuronpedia_search(GEMMA, "cats") == [9, 4]
    asked = {"modelId": "gemma-2-2b", "layers": ["20-gemmascope-res-16k"], "query": "cats"}
    assert neuronpedia == [("/api/explanation/search", asked)]
    monkeypatch.setenv("YAPO_NEURONPEDIA", "http://127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"Neuronpedia cannot be searched .*: find features by a text"):
        neuronpedia_search(GEMMA, "cats")


def test_labels_are_fetched_once(neuronpedia):
    assert neuronpedia_labels(GEMMA, [3, 7, 5]) == {3: "about 3", 5: "about 5"}
    assert neuronpedia[0] == "/api/feature/gemma-2-2b/20-gemmascope-res-16k/3"
    assert neuronpedia_labels(GEMMA, [5, 7]) == {5: "about 5"}
    assert len(neuronpedia) == 3


@pytest.mark.parametrize("content", ["", "[]", '{"3": 5, "7": {"a": 1}}'])
def test_damaged_label_cache_is_replaced(neuronpedia, content, tmp_path):
    file = tmp_path / "yapo_peft" / "neuronpedia" / "gemma-2-2b--20-gemmascope-res-16k.json"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    assert neuronpedia_labels(GEMMA, [3, 7]) == {3: "about 3"}
    assert json.loads(file.read_text()) == {"3": "about 3", "7": None}


def test_failed_label_requests_are_logged(neuronpedia, caplog, monkeypatch):
    assert neuronpedia_labels(GEMMA, [1, 13, 2]) == {1: "about 1"}
    assert "could not be fetched from Neuronpedia" in caplog.text
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert neuronpedia_labels(GEMMA, [1, 2]) == {1: "about 1"}
    assert len(neuronpedia) == 2
    assert neuronpedia_labels(SAEIdentity(None, None, 8, 8, "jumprelu", "0" * 64), [1]) == {}


def test_explain_includes_labels_and_links(neuronpedia, tokenizer, monkeypatch):
    model, _ = steered(layers=(2,))
    monkeypatch.setattr("yapo_peft.interpret.neuronpedia.neuronpedia_id", lambda release, sae_id: "tiny/2-res")
    table = explain(model, tokenizer=tokenizer, top=1)
    feature = table["feature"][0]
    assert table["link"][0].endswith(f"/tiny/2-res/{feature}")
    assert table["label"][0] == (None if feature == 7 else f"about {feature}")
    assert not [path for path in neuronpedia if not path.endswith(f"/{feature}")]
    several = explain(model, tokenizer=tokenizer, features=[5, 7, 13], top=None)
    assert all(label is None or isinstance(label, str) for label in several["label"])
    neuronpedia.clear()
    assert explain(model, tokenizer=tokenizer, top=1, labels=False)["label"].isna().all()
    assert not neuronpedia


def test_errors_name_bad_arguments(tokenizer):
    model, _ = steered()
    with pytest.raises(ConfigError, match="multiplier=0: an adapter has no effect"):
        explain(model, tokenizer=tokenizer, multiplier=0)
    with pytest.raises(ConfigError, match="top=0: must be a whole number"):
        explain(model, tokenizer=tokenizer, top=0)
    with pytest.raises(DatasetError, match="texts is a str, not a list or a dataset"):
        explain(model, tokenizer=tokenizer, texts="w1")
    for texts in ({"text": ["w1"]}, pd.DataFrame({"text": ["w1"]})):
        with pytest.raises(DatasetError, match=f"texts is a {type(texts).__name__}, not a list or a dataset"):
            explain(model, tokenizer=tokenizer, texts=texts)
    with pytest.raises(DatasetError, match=r"A row has no text in its columns \['foo'\]"):
        explain(model, tokenizer=tokenizer, texts=[{"foo": "w1"}])
    for features, message in (
        ([3], "pass features by layer"),
        ({0: [3]}, "the adapter steers layers"),
        ({1: [96]}, "must be below d_sae=96"),
    ):
        with pytest.raises(ConfigError, match=message):
            explain(model, tokenizer=tokenizer, features=features)
    with pytest.raises(DatasetError, match="3 is not a text"):
        explain(model, tokenizer=tokenizer, texts=[3])
    with pytest.raises(ConfigError, match="No tokenizer found"):
        explain(model)
