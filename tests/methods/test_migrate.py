import pytest
import torch
from _reference import yapo as reference
from peft import AutoPeftModelForCausalLM, get_peft_model
from tiny import D_MODEL, D_SAE, inference_sae, make_model, make_sae, random_code, random_ids

from yapo_cli import main
from yapo_peft import AdapterFileError, ConfigError, YaPOConfig
from yapo_peft.methods import import_vectors
from yapo_peft.tuner.adapters import steered_layers


def steered(space, layers=(2,)):
    saes = {"sae": [make_sae() for _ in layers]} if space == "sae" else {}
    return get_peft_model(make_model(), YaPOConfig(layers=list(layers), space=space, **saes)).eval()


@pytest.mark.feature("Methods", "`import_vectors`, `yapo migrate`: `vec_ep*.pt` of the published code, entry by entry")
@pytest.mark.parametrize("space", ["sae", "dense"])
@pytest.mark.parametrize("kind", ["tensor", "parameter", "row", "bfloat16"])
def test_import_vectors_copies_every_entry(tmp_path, space, kind):
    vector = torch.randn(D_SAE if space == "sae" else D_MODEL)
    saved = {
        "tensor": vector,
        "parameter": torch.nn.Parameter(vector),
        "row": vector[None],
        "bfloat16": vector.bfloat16(),
    }[kind]
    torch.save(saved, tmp_path / "vec_ep20_layer2.pt")
    model = steered(space)
    import_vectors(model, tmp_path / "vec_ep20_layer2.pt")
    (layer,) = steered_layers(model)
    assert torch.equal(layer.code("default"), saved.detach().float().squeeze())


def test_migrate_command_saves_adapter_that_steers_as_published_code(tmp_path, tokenizer, capsys):
    make_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    sae = make_sae()
    inference_sae(sae, tmp_path / "sae")
    code = random_code(scale=2.0)
    torch.save(code, tmp_path / "vec_ep20_layer2.pt")
    where = ["--model", str(tmp_path / "base"), "--sae-path", str(tmp_path / "sae"), "--out", str(tmp_path / "mine")]
    assert main(["migrate", str(tmp_path / "vec_ep20_layer2.pt"), *where]) == 0
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "mine").eval()
    published = make_model().eval()
    ids = random_ids()
    reference.steer_block(published.model.layers[2], code, sae, 1.0)
    with torch.no_grad():
        expected = published(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    torch.save(torch.ones(D_MODEL), tmp_path / "vec_ep1_layer1.pt")
    where = ["--model", str(tmp_path / "base"), "--out", str(tmp_path / "dense")]
    assert main(["migrate", str(tmp_path / "vec_ep1_layer1.pt"), *where]) == 0
    assert AutoPeftModelForCausalLM.from_pretrained(tmp_path / "dense").peft_config["default"].space == "dense"


def test_import_vectors_names_invalid_file(tmp_path):
    model = steered("sae", (1, 2))
    for layer in (1, 2):
        torch.save(torch.ones(D_SAE), tmp_path / f"vec_ep1_layer{layer}.pt")
    first, second = tmp_path / "vec_ep1_layer1.pt", tmp_path / "vec_ep1_layer2.pt"
    with pytest.raises(ConfigError, match=r"layers \[1\], but adapter 'default' steers layers \[1, 2\]"):
        import_vectors(model, [first])
    with pytest.raises(ConfigError, match="has no layer"):
        import_vectors(model, [tmp_path / "vector.pt"])
    with pytest.raises(FileNotFoundError):
        import_vectors(model, [tmp_path / "no" / "vec_ep1_layer1.pt", second])
    for wrong, message in (
        (torch.ones(D_MODEL), f"has d_sae={D_SAE}: use the SAE"),
        (torch.full((D_SAE,), torch.nan), "not finite"),
        (torch.ones(D_SAE, dtype=torch.long), "must be one floating-point tensor"),
        ({"a": 1}, "contains a dict"),
    ):
        torch.save(wrong, first)
        with pytest.raises(AdapterFileError, match=message):
            import_vectors(model, [first, second])
    for content in ("no tensor", "hello", ""):
        first.write_text(content)
        with pytest.raises(AdapterFileError, match=r"is not a file that torch\.save wrote"):
            import_vectors(model, [first, second])
    assert not any(layer.code("default").any() for layer in steered_layers(model))
