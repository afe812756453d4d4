import json

import pytest
import torch
from peft import get_peft_model
from tiny import make_model, make_sae

from yapo_peft import (
    AdapterFileError,
    ConfigError,
    SAEMismatchError,
    SAENotFoundError,
    UnsupportedSAEError,
    YaPOConfig,
    register_sae,
)
from yapo_peft.sae import SAEIdentity, load_sae


def test_load_sae_caches_folder(sae_folder):
    folder = sae_folder("jumprelu")
    assert load_sae(path=folder) is load_sae(path=folder)


def test_load_sae_reloads_overwritten_folder(tmp_path):
    make_sae("standard", seed=51).save_model(tmp_path)
    first = load_sae(path=str(tmp_path))
    make_sae("standard", seed=52).save_model(tmp_path)
    assert load_sae(path=str(tmp_path)).identity.content_hash != first.identity.content_hash


def test_an_overwritten_file_does_not_change_a_loaded_sae(tmp_path):
    make_sae("standard", seed=53).save_model(tmp_path)
    loaded = load_sae(path=str(tmp_path))
    before = loaded._native.W_dec.clone()
    file = tmp_path / "sae_weights.safetensors"
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        opened.write(b"\0" * (file.stat().st_size // 2))
    assert torch.equal(loaded._native.W_dec, before)


def test_the_scale_of_an_sae_in_training_is_folded(tmp_path):
    sae = make_sae("standard", seed=54, normalize_activations="expected_average_only_in")
    sae.b_enc.data.fill_(-0.5)
    sae.save_model(tmp_path)
    with pytest.raises(UnsupportedSAEError, match=r"or keep activation_scaler\.json"):
        load_sae(path=str(tmp_path))
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.05}))
    h = torch.randn(9, sae.cfg.d_in) * 20
    weights = load_sae(path=str(tmp_path)).weights(torch.device("cpu"), torch.float32)
    torch.testing.assert_close(weights.encode(h)[0], sae.encode(h * 0.05))
    torch.testing.assert_close(weights.W_dec, sae.W_dec.data / 0.05)


def test_saes_with_same_content_share_one_object(sae_folder):
    first = load_sae(path=sae_folder("jumprelu"))
    assert register_sae(make_sae("jumprelu")) == first.identity.content_hash
    assert load_sae(content_hash=first.identity.content_hash) is first


def test_release_keeps_its_name_if_content_was_registered_before(monkeypatch):
    from yapo_peft.sae import loader

    registered = load_sae(content_hash=register_sae(make_sae("standard", seed=41)))
    monkeypatch.setattr(loader, "_from_release", lambda release, sae_id: make_sae("standard", seed=41))
    released = load_sae(release="some-release", sae_id="layer_1")
    assert (released.identity.release, released.identity.sae_id) == ("some-release", "layer_1")
    assert released.identity.content_hash == registered.identity.content_hash
    cpu = torch.device("cpu")
    assert released.weights(cpu, torch.bfloat16).W_enc is registered.weights(cpu, torch.bfloat16).W_enc


def test_register_sae_copies_weights():
    sae = make_sae("standard", seed=31)
    frozen = load_sae(content_hash=register_sae(sae))
    before = frozen._native.W_dec.clone()
    sae.W_dec.data.mul_(2)
    assert torch.equal(frozen._native.W_dec, before)


def test_copies_made_in_inference_mode_are_normal_tensors(sae_folder):
    with torch.inference_mode():
        weights = load_sae(path=sae_folder("standard", seed=32)).weights(torch.device("cpu"), torch.bfloat16)
    assert not any(value.is_inference() for _, value in weights.tensors())


def test_existing_folder_takes_precedence_over_registered_sae(sae_folder, tmp_path):
    registered = register_sae(make_sae("standard", seed=21))
    folder = sae_folder("standard", seed=22)
    assert load_sae(path=folder, content_hash=registered).identity.content_hash != registered
    assert load_sae(path=str(tmp_path / "gone"), content_hash=registered).identity.content_hash == registered


@pytest.mark.parametrize(
    "change", [{"content_hash": "no hash"}, {"content_hash": None}, {"d_sae": "96"}, {"architecture": None}]
)
def test_from_dict_rejects_invalid_identity(sae_folder, change):
    recorded = load_sae(path=sae_folder("jumprelu")).identity.to_dict()
    assert SAEIdentity.from_dict({**recorded, "of a later version": 1}).to_dict() == recorded
    with pytest.raises(AdapterFileError, match=r"sae_identity in adapter_config\.json"):
        SAEIdentity.from_dict({**recorded, **change})


@pytest.mark.parametrize("change", [{"seed": 1}, {"kind": "standard"}])
def test_require_same_rejects_different_content(sae_folder, change):
    kind = change.pop("kind", "jumprelu")
    first, second = load_sae(path=sae_folder("jumprelu")), load_sae(path=sae_folder(kind, seed=change.get("seed", 0)))
    assert first.identity.content_hash != second.identity.content_hash
    with pytest.raises(SAEMismatchError, match=r"SAE for layer 3 .*content_hash: .* in training, .* now") as error:
        second.identity.require_same(first.identity.to_dict(), "layer 3")
    assert ("architecture: 'jumprelu' in training, 'standard' now" in str(error.value)) == (kind == "standard")


def test_missing_folder_error_names_folder_and_files(tmp_path):
    with pytest.raises(SAENotFoundError, match=r"No SAE in '.*nowhere': cfg.json and sae_weights.safetensors missing"):
        load_sae(path=str(tmp_path / "nowhere"))


def test_unknown_release_error_names_release():
    with pytest.raises(SAENotFoundError, match="has no release 'gemma-scope-99b'"):
        load_sae(release="gemma-scope-99b", sae_id="layer_15/width_65k/average_l0_68")


def test_unknown_sae_id_error_lists_known_ids():
    with pytest.raises(
        SAENotFoundError, match=r"Release 'gemma-scope-2b-pt-res' has no SAE 'layer_99'. use one of its \d+, such"
    ):
        load_sae(release="gemma-scope-2b-pt-res", sae_id="layer_99")


def test_sae_of_the_paper_is_in_sae_lens_directory():
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    directory = get_pretrained_saes_directory()
    assert "layer_15/width_65k/average_l0_68" in directory["gemma-scope-2b-pt-res"].saes_map


def test_missing_source_error_lists_sources():
    with pytest.raises(SAENotFoundError, match="sae_release and sae_id, or sae_path"):
        load_sae(content_hash="0" * 64)


@pytest.mark.feature(
    "SAEs",
    "Transcoders, temporal, matching pursuit and AbsTopK SAEs",
    refused="the identity behind steering does not hold for them",
)
@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("transcoder", "does not reconstruct its own input"),
        ("temporal", "depend on other tokens"),
        ("matching_pursuit", "iterative"),
        ("abstopk", "can be negative"),
        ("crystal", "unknown"),
    ],
)
def test_unsupported_architecture_raises(architecture, reason):
    from yapo_peft.sae.loader import _require_supported

    with pytest.raises(UnsupportedSAEError, match=f"'{architecture}' is not supported: .*{reason}"):
        _require_supported(architecture, {"normalize_activations": "none"})


@pytest.mark.feature("SAEs", "Unfolded whitening; SAEs of attention heads", refused="steering is not defined for them")
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"normalize_activations": "covariance_whitening"},
            "normalize_activations='covariance_whitening' is not supported",
        ),
        ({"reshape_activations": "hook_z"}, "reads attention heads"),
    ],
)
def test_unsupported_setting_raises(setting, message):
    with pytest.raises(UnsupportedSAEError, match=message):
        register_sae(make_sae("standard", **setting))


def test_what_is_no_sae_is_named():
    for given in ((make_sae(), {}, None), "an SAE"):
        with pytest.raises(ConfigError, match=rf"sae is a {type(given).__name__}: must be an SAE of sae-lens"):
            YaPOConfig(layers=2, sae=given)


def test_an_sae_of_the_embeddings_is_not_one_of_the_last_layer():
    sae = make_sae("gated", seed=31)
    sae.cfg.metadata.hook_name = "blocks.0.hook_resid_pre"
    with pytest.raises(SAEMismatchError, match="the embeddings, which no layer outputs"):
        get_peft_model(make_model(), YaPOConfig(layers=0, sae=sae))


@pytest.mark.parametrize(
    ("hook_name", "layer"),
    [
        ("blocks.15.hook_resid_post", 15),
        ("blocks.16.hook_resid_pre", 15),
        ("model.layers.15", 15),
        ("transformer.h.3", 3),
        (None, None),
    ],
)
def test_layer_is_read_from_hook_name(hook_name, layer):
    sae = make_sae("gated")
    sae.cfg.metadata.hook_name = hook_name
    assert load_sae(content_hash=register_sae(sae)).block == layer


@pytest.mark.feature(
    "SAEs", "SAEs of activations other than a layer's output", refused="only the output of a layer is steered"
)
@pytest.mark.parametrize("hook_name", ["blocks.15.hook_mlp_out", "blocks.15.attn.hook_z", "ln_final.hook_normalized"])
def test_hook_name_other_than_layer_output_raises(hook_name):
    sae = make_sae("gated")
    sae.cfg.metadata.hook_name = hook_name
    with pytest.raises(UnsupportedSAEError, match=f"reads '{hook_name}', which is not the output of a layer"):
        _ = load_sae(content_hash=register_sae(sae)).block
