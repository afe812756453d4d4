import ast
import re

import pytest
import torch
from huggingface_hub import ModelCard
from peft import get_peft_model
from safetensors.torch import load_file
from tiny import make_model, make_sae, make_wrapper, random_code, set_code

import yapo_peft
from yapo_peft import ConfigError, YaPOConfig, model_card
from yapo_peft.adapter_file.card import add_findings
from yapo_peft.interpret import explain
from yapo_peft.tuner.adapters import steered_layers
from yapo_peft.tuner.config import digest_of


def steered(**options):
    return get_peft_model(
        make_model(), YaPOConfig(**{"layers": [1, 2], "sae": [make_sae(), make_sae("topk")], **options})
    )


def test_an_adapter_is_saved_with_a_card(tmp_path):
    model = steered(positions="last", multiplier=-0.5)
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert {"yapo", "sparse-autoencoder"} <= set(card.data.tags)
    assert card.data.library_name == "peft"
    identities = model.peft_config["default"].sae_identity
    for layer, kind, identity in zip((1, 2), ("jumprelu", "topk"), identities, strict=True):
        row = f"| {layer} | an object that was handed in | 96 | {kind} | `{identity['content_hash'][:12]}` |"
        assert row in card.content
    assert "`positions='last'`. Multiplier when loaded: -0.5." in card.content
    assert "yapo_peft.register_sae(" in card.content


def test_a_card_that_someone_wrote_only_gets_the_tags(tmp_path):
    written = "---\ntags:\n- mine\n---\n\n# My adapter\n\nMy words.\n"
    (tmp_path / "README.md").write_text(written)
    model = steered()
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert "yapo" in card.data.tags
    assert "My words." in card.content
    assert card.content.count("# My adapter") == 1
    assert "What it steers" not in card.content


def test_a_card_of_ours_says_what_the_adapter_steers_now(tmp_path):
    model = steered()
    card = model_card(model, repo_id="me/polite", metrics={"accuracy": 0.9}, training={"beta": 0.1})
    card.save(tmp_path / "README.md")
    model.save_pretrained(tmp_path)
    before = (tmp_path / "README.md").read_text()
    assert "| beta | 0.1 |" in before
    model.peft_config["default"].damage = {"plus": 0.0123, "minus": 0.0456}
    model.peft_config["default"].damage_of = digest_of(layer.code("default") for layer in steered_layers(model))
    model.save_pretrained(tmp_path)
    after = (tmp_path / "README.md").read_text()
    assert "by KL 0.012 nats per token, and by 0.046 at -1" in after
    assert "# polite" in after
    assert "## Evaluation" not in after
    assert "| beta |" not in after
    get_peft_model(make_model(), YaPOConfig(layers=1, space="dense")).save_pretrained(tmp_path)
    dense = ModelCard.load(tmp_path / "README.md")
    assert "At each steered layer, a vector that is added" in dense.content
    assert "autoencoder" not in dense.content
    assert "sparse-autoencoder" not in dense.data.tags

    # What someone has edited stays, in any section.
    (tmp_path / "README.md").write_text(before.replace("| beta | 0.1 |", "| beta | 0.1, as we always do |"))
    model.save_pretrained(tmp_path)
    assert "as we always do" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text(before.replace("Multiplier when loaded", "By the way, multiplier when loaded"))
    model.save_pretrained(tmp_path)
    kept = (tmp_path / "README.md").read_text()
    assert "By the way" in kept
    assert "KL 0.012" not in kept
    assert "| beta | 0.1 |" in kept


@pytest.mark.parametrize("where", ["release", "folder"])
def test_where_the_sae_comes_from_is_named(tmp_path, sae_folder, where):
    config = YaPOConfig(layers=2, sae_path=sae_folder())
    get_peft_model(make_model(), config)
    if where == "release":
        config.sae_path = None
        config.sae_identity[0] |= {"release": "gemma-scope", "sae_id": "layer_2/width_16k"}
    config.save_pretrained(str(tmp_path))
    card = (tmp_path / "README.md").read_text()
    named = "`gemma-scope`, `layer_2/width_16k`" if where == "release" else "a local folder, `sae-jumprelu-`"
    assert f"| 2 | {named} |" in card
    assert ("register_sae" in card) == (where == "folder")
    assert str(tmp_path) not in card


def test_what_the_user_knows_about_the_training_is_in_the_card(tmp_path):
    metrics = {"accuracy": 0.98765}
    card = model_card(
        steered(), repo_id="me/polite", dataset="me/pairs", metrics=metrics, training={"beta": 0.1, "seed": 0}
    )
    for text in ("# polite", "| dataset | me/pairs |", "| beta | 0.1 |", "| seed | 0 |", "| accuracy | 0.9877 |"):
        assert text in card.content
    assert card.data.datasets == ["me/pairs"]
    assert '.from_pretrained("me/polite")' in card.content
    (tmp_path / "pairs").mkdir()
    card = model_card(steered(), dataset=str(tmp_path / "pairs"))
    assert card.data.datasets is None
    assert "| dataset | pairs |" in card.content


@pytest.mark.parametrize("name", [None, "polite"])
def test_a_model_without_the_adapter_has_no_card(name):
    model = make_model() if name is None else steered()
    with pytest.raises(ConfigError, match="no YaPO adapter"):
        yapo_peft.model_card(model, name)


def test_top_features_and_a_picture_are_in_the_card(tokenizer):
    model = steered()
    set_code(model, random_code(0.5))
    table = explain(model, tokenizer=tokenizer, tokens=2)
    table.at[0, "promotes"] = ["a|b", "c`d", " e\nf"]
    table.at[1, "link"] = "https://neuronpedia.org/tiny/1/5"
    table.at[1, "label"] = "one | two"
    card = model_card(model, features=table, plot="doses.png").content
    assert "![Effect by multiplier](doses.png)" in card
    rows = [line for line in card.splitlines() if "constant |" in line or "input-dependent |" in line]
    assert len(rows) == 10
    assert all(line.count("|") == 8 for line in rows)
    first = table.iloc[0]
    assert rows[0].startswith(
        f"| 1 | {first['feature']} | {first['value']:+.3g} | {first['effect']} | `a¦b` `c'd` `·e·f` |"
    )
    assert f"[{table['feature'][1]}](https://neuronpedia.org/tiny/1/5)" in rows[1]
    assert rows[1].endswith("| one ¦ two |")
    dense = get_peft_model(make_model(), YaPOConfig(layers=2, space="dense"))
    assert "| 2 | vector | +0 | constant |" in model_card(dense, features=explain(dense, tokenizer=tokenizer)).content
    table.at[2, "label"] = table.at[2, "link"] = float("nan")
    assert "nan" not in model_card(model, features=table).content
    assert "## Features" not in model_card(model).content


@pytest.mark.parametrize("at_end", [True, False])
def test_findings_go_into_a_card_that_is_there(tokenizer, at_end):
    model = steered()
    set_code(model, random_code(0.5))
    table = explain(model, tokenizer=tokenizer, tokens=2)
    written = "# Mine\n\nMy words.\n" + ("" if at_end else "\n## Versions\n\n- all\n\n## Thanks\n\nTo you.\n")
    card = ModelCard(f"---\ntags:\n- mine\nlicense: mit\n---\n\n{written}")
    once = add_findings(card, features=table, plot="doses.png")
    assert once.data.tags == ["mine"]
    assert re.findall("^## (.*)", once.text, re.MULTILINE) == ["What it does", "Features"] + (
        [] if at_end else ["Versions", "Thanks"]
    )
    again = add_findings(once, features=table.tail(1), plot="others.png")
    assert "My words." in again.text
    assert "doses.png" not in again.text
    assert again.text.count("## Features") == 1
    assert again.text.count("| constant |") + again.text.count("| input-dependent |") == 1
    assert "To you." in again.text or at_end
    assert add_findings(again, features=table, plot="doses.png").content == once.content
    assert "What it does" not in card.text


def test_the_card_of_a_self_contained_adapter_asks_for_no_sae(tmp_path):
    model = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae(), self_contained=True))
    set_code(model, random_code(0.2))
    model.save_pretrained(tmp_path)
    assert "register_sae" not in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("base", ["me/model", None])
def test_tags_that_peft_and_the_model_give_are_kept(tmp_path, base):
    plain = make_model()
    plain.add_model_tags(["mine"])
    model = get_peft_model(plain, YaPOConfig(layers=2, space="dense"))
    model.peft_config["default"].base_model_name_or_path = base or str(tmp_path)
    model.save_pretrained(tmp_path)
    for card in (ModelCard.load(tmp_path / "README.md"), model_card(model)):
        expected = {"mine", "transformers", "yapo", "steering", "activation-steering"}
        assert set(card.data.tags) == expected | ({f"base_model:adapter:{base}"} if base else set())


def test_the_snippet_of_a_vision_wrapper_loads_it(tmp_path):
    torch.manual_seed(0)
    wrapper = make_wrapper()
    wrapper.save_pretrained(tmp_path / "base")
    base = type(wrapper).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, YaPOConfig(layers=2, space="dense", init_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    snippet = re.search(r"```python\n(.*?)```", (tmp_path / "adapter" / "README.md").read_text(), re.DOTALL)[1]
    assert "AutoPeft" not in snippet
    found = {}
    for name, folder in {"folder/of/the/model": "base", "folder/of/this/adapter": "adapter"}.items():
        assert name in snippet
        snippet = snippet.replace(name, str(tmp_path / folder))
    lines = snippet.splitlines()
    exec("\n".join(line for line in lines if line.startswith(("import", "from", "model ="))), found)
    assert type(found["model"].get_base_model()) is type(wrapper)
    codes = (load_file(tmp_path / "adapter" / "adapter_model.safetensors"), found["model"].state_dict())
    values = next(tensor for name, tensor in codes[0].items() if name.endswith("values"))
    assert any(torch.equal(tensor, values) for name, tensor in codes[1].items() if ".yapo_code." in name)


def test_a_class_name_that_is_none_stays_out_of_the_snippet(tmp_path):
    config = YaPOConfig(
        layers=2, space="dense", auto_mapping={"base_model_class": "x\nimport os", "parent_library": ""}
    )
    config.save_pretrained(str(tmp_path))
    assert "import os" not in (tmp_path / "README.md").read_text()


def test_what_a_config_says_stays_text(tmp_path):
    config = YaPOConfig(layers=2, sae=make_sae())
    get_peft_model(make_model(), config)
    evil = 'x")\nimport os\n```\n<b> | [click](http://evil)'
    config.base_model_name_or_path = evil
    config.sae_identity[0] |= {"release": evil, "sae_id": "`", "architecture": "a | b"}
    config.save_pretrained(str(tmp_path))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model is None
    snippet = re.search(r"```python\n(.*?)```", card.content, re.DOTALL)[1]
    nodes = list(ast.walk(ast.parse(snippet)))
    assert not any("evil" in str(node.value) for node in nodes if isinstance(node, ast.Constant))
    assert {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names} == {"yapo_peft"}
    (row,) = [line for line in card.content.splitlines() if line.startswith("| 2 |")]
    assert row.count(" | ") == 4
    assert not any("import os" in line for line in card.content.splitlines() if "`" not in line and '"' not in line)
