import json
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import make_model, make_sae, random_code, set_code

from yapo_peft import AdapterFileError, ConfigError, SAEError, YaPOConfig, steering
from yapo_peft.app import Dials, Playground, serve_page
from yapo_peft.methods import set_features
from yapo_peft.scoring.pairs import prompt_ids
from yapo_peft.tuner.adapters import steered_layers

PROMPT = "w1 w2 w3"


@pytest.fixture
def model():
    """A model with adapter "one" on layers 1 and 2, and adapter "two" on layer 2."""
    model = get_peft_model(make_model(), YaPOConfig(layers=[1, 2], sae=[make_sae(), make_sae(seed=1)]), "one")
    model.add_adapter("two", YaPOConfig(layers=2, space="dense"))
    set_code(model, 3 * random_code(0.4), "one")
    set_code(model, 20 * random_code(1.0, seed=3), "two")
    return model.eval()


@pytest.fixture
def playground(model, tokenizer, tmp_path):
    return Playground(model, tokenizer, tmp_path / "saved")


def last(generator):
    return list(generator)[-1]


def generated(model, tokenizer, **options):
    ids = torch.tensor([prompt_ids([{"role": "user", "content": PROMPT}], tokenizer)])
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def state_of(model):
    layers = steered_layers(model)
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [(layer.active_adapters, dict(layer.multiplier), layer.is_lowest, layer.training) for layer in layers],
        torch.get_rng_state(),
    )


def require_same(one, two):
    assert one[0].keys() == two[0].keys()
    assert all(torch.equal(value, two[0][name]) for name, value in one[0].items())
    assert one[1] == two[1]
    assert torch.equal(one[2], two[2])


@pytest.mark.feature("Reading", "`yapo app`: a playground on this machine")
@pytest.mark.parametrize("multiplier", [1.0, -1.5])
def test_answers_match_the_steered_and_unsteered_model(playground, model, tokenizer, multiplier):
    before = state_of(model)
    answers = list(playground.answers(PROMPT, Dials({"one": multiplier}), max_new_tokens=8))
    require_same(state_of(model), before)
    assert len(answers) == 8
    unsteered, steered = answers[-1]
    assert all(unsteered.startswith(part) and steered.startswith(other) for part, other in answers)
    with model.disable_adapter():
        assert generated(model, tokenizer) == unsteered
    with steering(model, multiplier, "one"):
        assert generated(model, tokenizer) == steered != unsteered


def test_each_adapter_has_its_own_multiplier(playground, model, tokenizer):
    _, steered = last(playground.answers(PROMPT, Dials({"one": 0.7, "two": -1.2}), max_new_tokens=8))
    for layer in steered_layers(model):
        layer.activate([name for name in ("one", "two") if name in layer.yapo_code])
        layer.multiplier.update({"one": 0.7, "two": -1.2})
    assert generated(model, tokenizer) == steered
    unsteered, same = last(playground.answers(PROMPT, Dials(), max_new_tokens=8))
    assert unsteered == same


def test_values_set_single_features_for_one_answer(playground, model, tokenizer):
    code = steered_layers(model)[0].yapo_code["one"].data
    features = code.nonzero().squeeze(-1).tolist()
    unused = next(feature for feature in range(len(code)) if feature not in features)
    values = {("one", 1, feature): 0.0 for feature in features} | {("one", 1, unused): -2.0}
    before = state_of(model)
    answer = last(playground.answers(PROMPT, Dials({"one": 1.0}, values), max_new_tokens=8))[1]
    require_same(state_of(model), before)
    code.zero_()
    code[unused] = -2
    with steering(model, 1.0, "one"):
        assert generated(model, tokenizer) == answer


def test_features_that_are_found_show_and_keep_their_values(playground, model):
    from yapo_peft.app.page import _dials, _rows

    code = steered_layers(model)[0].yapo_code["one"].data
    steered, other = int(code.nonzero()[0]), int((code == 0).nonzero()[0])
    rows = [
        row
        for feature in (steered, other)
        for row in _rows(playground, "one", playground.find("one", f"1:{feature}", "number"))
    ]
    assert [row[3] for row in rows] == [pytest.approx(float(code[steered]), abs=1e-3), None]
    assert _dials(playground, ["one"], {}, rows).values == {}
    rows[0][3], rows[1][3] = "", "2.5"
    assert _dials(playground, ["one"], {}, rows).values == {("one", 1, steered): None, ("one", 1, other): 2.5}


def test_values_are_not_those_of_an_answer_that_is_generated(playground, model):
    place, found = ("one", 1, 3), {}
    expected = float(steered_layers(model)[0].yapo_code["one"].data[3])
    reader = threading.Thread(target=lambda: found.update(playground.values([place])))
    with playground._lock, playground._changed_codes(Dials({"one": 1.0}, {place: 9.0})):
        reader.start()
        reader.join(0.3)
        assert reader.is_alive()
    reader.join()
    assert found == {place: expected or None}


def test_held_features_are_turned_off_and_removed(tokenizer):
    model = get_peft_model(make_model(), YaPOConfig(layers=1, sae=make_sae(), mode="clamp"), "one").eval()
    set_features(model, {1: {5: 30.0, 7: 0.0}})
    playground = Playground(model, tokenizer)
    places = [("one", 1, feature) for feature in (5, 7, 9)]
    assert list(playground.values(places).values()) == [30.0, 0.0, None]
    answers = {}
    for value in (30.0, 0.0, None):
        answers[value] = last(playground.answers(PROMPT, Dials({"one": 1.0}, {("one", 1, 5): value}), 8))[1]
        set_features(model, {1: {5: value}})
        with steering(model, 1.0):
            assert generated(model, tokenizer) == answers[value]
        set_features(model, {1: {5: 30.0}})
    assert len(set(answers.values())) > 1
    with pytest.raises(ConfigError, match=r"Feature 5 of layer 1 cannot be held at -1\.0"):
        last(playground.answers(PROMPT, Dials({"one": 1.0}, {("one", 1, 5): -1.0}), 8))


def test_an_adapter_is_called_as_its_folder_if_peft_takes_the_name(playground, model, tmp_path):
    model.save_pretrained(tmp_path, selected_adapters=["one"])
    for folder, name in {"model": "adapter-model", "2024": "adapter-2024", "polite v1": "polite-v1"}.items():
        (tmp_path / "one").rename(tmp_path / folder)
        assert playground.load(str(tmp_path / folder)) == name
        (tmp_path / folder).rename(tmp_path / "one")


def test_concurrent_users_do_not_share_dials(playground, model, tokenizer):
    expected = {
        multiplier: last(playground.answers(PROMPT, Dials({"one": multiplier}), 8)) for multiplier in (-2.0, 0.5, 3.0)
    }
    answers = {}

    def user(multiplier):
        answers[multiplier] = [last(playground.answers(PROMPT, Dials({"one": multiplier}), 8)) for _ in range(4)]

    users = [threading.Thread(target=user, args=(multiplier,)) for multiplier in expected]
    for thread in users:
        thread.start()
    for thread in users:
        thread.join()
    assert answers == {multiplier: [answer] * 4 for multiplier, answer in expected.items()}


def test_closing_the_answer_stops_generation(playground, model):
    before = state_of(model)
    answers = playground.answers(PROMPT, Dials({"one": 1.0}), max_new_tokens=100)
    next(answers)
    answers.close()
    require_same(state_of(model), before)
    assert len(list(playground.answers(PROMPT, Dials({"one": 1.0}), max_new_tokens=3))) == 3


def test_error_during_generation_is_raised_and_restores_the_model(playground, model, monkeypatch):
    before = state_of(model)

    def broken(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.get_base_model().model.layers[3].mlp, "forward", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(playground.answers(PROMPT, Dials({"one": 1.0})))
    require_same(state_of(model), before)


def test_invalid_prompts_and_dials_raise(playground):
    with pytest.raises(ConfigError, match="prompt is empty"):
        next(playground.answers("  ", Dials()))
    with pytest.raises(
        ConfigError, match="prompt of 204 tokens with max_new_tokens=80 has 284 tokens, but the model takes at most 256"
    ):
        next(playground.answers("w1 " * 199, Dials()))
    with pytest.raises(ConfigError, match="adapter_name='three'"):
        next(playground.answers(PROMPT, Dials({"three": 1.0})))


def test_features_and_activations(playground, model, tokenizer):
    table = playground.features("one", top=3)
    assert len(table) == 6
    feature = int(table["feature"][0])
    tokens, activations = playground.activity("w1 w2 w3", "one", (1, feature))
    hidden = make_model()(**tokenizer("w1 w2 w3", return_tensors="pt"), output_hidden_states=True).hidden_states[2]
    values = make_sae().encode(hidden.detach())[0, :, feature]
    assert tokens == ["w1", "w2", "w3"]
    assert activations == pytest.approx(values.tolist(), abs=1e-4)
    assert playground.activity("", "one", (1, feature)) == ([], [])
    with pytest.raises(ConfigError, match="has no feature 3 at layer 0"):
        playground.activity("w1", "one", (0, 3))


def test_saved_adapter_loads_with_its_dials_applied(playground, model, tokenizer):
    code = steered_layers(model)[1].yapo_code["one"].data
    feature = int(code.abs().argmax())
    dials = Dials({"one": -0.5}, {("one", 2, feature): 0.0})
    before = state_of(model)
    target = playground.save("one", dials, "mine")
    require_same(state_of(model), before)
    assert sorted(file.name for file in target.parent.iterdir()) == ["mine"]
    expected = last(playground.answers(PROMPT, dials, 8))[1]
    assert model.peft_config["one"].multiplier == 1.0
    name = playground.load(str(target))
    assert name == "mine"
    assert float(steered_layers(model)[1].yapo_code["mine"][feature]) == 0
    assert last(playground.answers(PROMPT, Dials({"mine": -0.5}), 8))[1] == expected
    assert model.peft_config["mine"].multiplier == -0.5
    assert playground.load(str(target)) == "mine-2"
    with pytest.raises(ConfigError, match="already exists"):
        playground.save("one", dials, "mine")
    for bad in ("../mine", "", "a b", ".hidden"):
        with pytest.raises(ConfigError, match="may only have letters"):
            playground.save("one", dials, bad)


def test_what_a_user_can_ask_for_is_bounded(playground, tokenizer):
    dials = Dials({"one": 1.0})
    for options, message in (
        ({"max_new_tokens": 401}, "max_new_tokens=401: must be at most 400"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"seed": 2**64}, f"seed={2**64}: must be between"),
        ({"temperature": float("nan")}, "temperature=nan"),
    ):
        with pytest.raises(ConfigError, match=message):
            list(playground.answers("w1", dials, **options))
    with pytest.raises(ConfigError, match="multiplier=inf"):
        list(playground.answers("w1", Dials({"one": float("inf")})))
    full = Playground(playground.model, tokenizer, playground.folder, max_adapters=2)
    with pytest.raises(ConfigError, match="2 adapters are loaded, the most"):
        full.load(str(playground.save("one", dials, "another")))


def test_load_accepts_only_safetensors_of_this_method_and_model(playground, model, tmp_path):
    target = playground.save("one", Dials(), "mine")
    file = target / "adapter_model.safetensors"
    torch.save({}, target / "adapter_model.bin")
    content = file.read_bytes()
    file.unlink()
    with pytest.raises(AdapterFileError, match="pickled files can execute code"):
        playground.load(str(target))
    file.write_bytes(content[:100])
    with pytest.raises(AdapterFileError, match="truncated"):
        playground.load(str(target))
    assert playground.adapters == ["one", "two"]
    get_peft_model(make_model(), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "lora")
    with pytest.raises(AdapterFileError, match="method LORA, not of YaPO"):
        playground.load(str(tmp_path / "lora"))
    for blank in ("", "  "):
        with pytest.raises(ConfigError, match="Enter the folder"):
            playground.load(blank)
    with pytest.raises(AdapterFileError, match="No adapter can be read from 'nobody/nothing'"):
        playground.load("nobody/nothing")
    other = playground.save("one", Dials(), "other")
    config = json.loads((other / "adapter_config.json").read_text())
    config["sae_identity"][0]["content_hash"] = "0" * 64
    (other / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(SAEError):
        playground.load(str(other))
    assert playground.adapters == ["one", "two"]


def test_requests_by_another_host_name_are_refused():
    pytest.importorskip("gradio")  # which brings starlette
    from starlette.applications import Starlette
    from starlette.responses import Response
    from starlette.routing import Route
    from starlette.testclient import TestClient

    class Page:
        def launch(self, **options):
            self.options = options
            return None, "http://127.0.0.1:7860/", None

    page = Page()
    assert serve_page(page) == "http://127.0.0.1:7860/"
    assert (page.options["server_name"], page.options["share"]) == ("127.0.0.1", False)
    app = Starlette(routes=[Route("/", lambda request: Response())], **page.options["app_kwargs"])
    hosts = {"attacker.example": 400, "127.0.0.1.attacker.example": 400, "localhost:7860": 200, "127.0.0.1:7860": 200}
    with TestClient(app) as client:
        assert {host: client.get("/", headers={"Host": host}).status_code for host in hosts} == hosts
