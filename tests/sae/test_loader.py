import pytest
import torch
from tiny import make_sae

from yapo_peft import AdapterFileError, SAEMismatchError, SAENotFoundError, UnsupportedSAEError, register_sae
from yapo_peft.sae import SAEIdentity, load_sae


def test_a_folder_is_loaded_once(sae_folder):
    folder = sae_folder("jumprelu")
    assert load_sae(path=folder) is load_sae(path=folder)


def test_a_folder_with_another_sae_in_it_is_loaded_again(tmp_path):
    make_sae("standard", seed=51).save_model(tmp_path)
    first = load_sae(path=str(tmp_path))
    make_sae("standard", seed=52).save_model(tmp_path)
    assert load_sae(path=str(tmp_path)).identity.content_hash != first.identity.content_hash


def test_the_same_content_is_one_object_whatever_its_name(sae_folder):
    first = load_sae(path=sae_folder("jumprelu"))
    assert register_sae(make_sae("jumprelu")) == first.identity.content_hash
    assert load_sae(content_hash=first.identity.content_hash) is first


def test_a_release_keeps_its_name_when_its_content_was_there_before(monkeypatch):
    from yapo_peft.sae import loader

    handed_in = load_sae(content_hash=register_sae(make_sae("standard", seed=41)))
    monkeypatch.setattr(loader, "_from_release", lambda release, sae_id: make_sae("standard", seed=41))
    released = load_sae(release="some-release", sae_id="layer_1")
    assert (released.identity.release, released.identity.sae_id) == ("some-release", "layer_1")
    assert released.identity.content_hash == handed_in.identity.content_hash
    cpu = torch.device("cpu")
    assert released.weights(cpu, torch.bfloat16).W_enc is handed_in.weights(cpu, torch.bfloat16).W_enc


def test_an_sae_that_is_handed_in_is_copied():
    sae = make_sae("standard", seed=31)
    frozen = load_sae(content_hash=register_sae(sae))
    before = frozen._native.W_dec.clone()
    sae.W_dec.data.mul_(2)
    assert torch.equal(frozen._native.W_dec, before)


def test_copies_made_in_inference_mode_can_be_trained_with(sae_folder):
    with torch.inference_mode():
        weights = load_sae(path=sae_folder("standard", seed=32)).weights(torch.device("cpu"), torch.bfloat16)
    assert not any(value.is_inference() for _, value in weights.tensors())


def test_a_folder_that_exists_is_read_whatever_was_handed_in(sae_folder, tmp_path):
    handed_in = register_sae(make_sae("standard", seed=21))
    folder = sae_folder("standard", seed=22)
    assert load_sae(path=folder, content_hash=handed_in).identity.content_hash != handed_in
    assert load_sae(path=str(tmp_path / "gone"), content_hash=handed_in).identity.content_hash == handed_in


@pytest.mark.parametrize(
    "change", [{"content_hash": "no hash"}, {"content_hash": None}, {"d_sae": "96"}, {"architecture": None}]
)
def test_a_recorded_identity_that_makes_no_sense_is_refused(sae_folder, change):
    recorded = load_sae(path=sae_folder("jumprelu")).identity.to_dict()
    assert SAEIdentity.from_dict({**recorded, "of a later version": 1}).to_dict() == recorded
    with pytest.raises(AdapterFileError, match=r"sae_identity in adapter_config\.json"):
        SAEIdentity.from_dict({**recorded, **change})


@pytest.mark.parametrize("change", [{"seed": 1}, {"kind": "standard"}])
def test_another_content_has_another_hash(sae_folder, change):
    kind = change.pop("kind", "jumprelu")
    first, second = load_sae(path=sae_folder("jumprelu")), load_sae(path=sae_folder(kind, seed=change.get("seed", 0)))
    assert first.identity.content_hash != second.identity.content_hash
    with pytest.raises(SAEMismatchError, match=r"for layer 3 \(.*content_hash: .* when trained, .* now") as error:
        second.identity.require_same(first.identity.to_dict(), "layer 3")
    assert ("architecture: 'jumprelu' when trained, 'standard' now" in str(error.value)) == (kind == "standard")


def test_missing_folder_names_the_folder_and_the_files(tmp_path):
    with pytest.raises(SAENotFoundError, match=r"No SAE in '.*nowhere': cfg.json and sae_weights.safetensors missing"):
        load_sae(path=str(tmp_path / "nowhere"))


def test_unknown_release_is_named():
    with pytest.raises(SAENotFoundError, match="knows no release 'gemma-scope-99b'"):
        load_sae(release="gemma-scope-99b", sae_id="layer_15/width_65k/average_l0_68")


def test_unknown_id_lists_known_ones():
    with pytest.raises(
        SAENotFoundError, match=r"Release 'gemma-scope-2b-pt-res' has no SAE 'layer_99'. It has \d+, such"
    ):
        load_sae(release="gemma-scope-2b-pt-res", sae_id="layer_99")


def test_published_choices_are_in_sae_lens_directory():
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    directory = get_pretrained_saes_directory()
    assert "layer_15/width_65k/average_l0_68" in directory["gemma-scope-2b-pt-res"].saes_map


def test_nothing_given_says_what_to_give():
    with pytest.raises(SAENotFoundError, match="sae_release and sae_id, or sae_path"):
        load_sae(content_hash="0" * 64)


@pytest.mark.feature(
    "SAEs",
    "Transcoders, temporal, matching pursuit and AbsTopK SAEs",
    refused="the identity that steering stands on does not hold for them",
)
@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("transcoder", "predicts another activation"),
        ("temporal", "depend on other tokens"),
        ("matching_pursuit", "iterative"),
        ("abstopk", "can be negative"),
        ("crystal", "not known here"),
    ],
)
def test_architectures_without_a_rule_are_refused(architecture, reason):
    from yapo_peft.sae.loader import _require_supported

    with pytest.raises(UnsupportedSAEError, match=f"'{architecture}' cannot steer: .*{reason}"):
        _require_supported(architecture, {"normalize_activations": "none"})


@pytest.mark.feature(
    "SAEs", "Unfolded whitening; SAEs of attention heads", refused="there is no steering rule for them"
)
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"normalize_activations": "covariance_whitening"}, "'covariance_whitening', which has no steering rule"),
        ({"reshape_activations": "hook_z"}, "reads attention heads"),
    ],
)
def test_settings_without_a_rule_are_refused(setting, message):
    with pytest.raises(UnsupportedSAEError, match=message):
        register_sae(make_sae("standard", **setting))


@pytest.mark.parametrize(
    ("hook_name", "block"),
    [
        ("blocks.15.hook_resid_post", 15),
        ("blocks.16.hook_resid_pre", 15),
        ("model.layers.15", 15),
        ("transformer.h.3", 3),
        (None, None),
    ],
)
def test_the_block_is_read_from_the_hook_point(hook_name, block):
    sae = make_sae("gated")
    sae.cfg.metadata.hook_name = hook_name
    assert load_sae(content_hash=register_sae(sae)).block == block


@pytest.mark.feature(
    "SAEs", "SAEs of something else than a block's output", refused="only the output of a block is steered"
)
@pytest.mark.parametrize("hook_name", ["blocks.15.hook_mlp_out", "blocks.15.attn.hook_z", "ln_final.hook_normalized"])
def test_hook_points_other_than_a_block_output_are_refused(hook_name):
    sae = make_sae("gated")
    sae.cfg.metadata.hook_name = hook_name
    with pytest.raises(UnsupportedSAEError, match=f"reads '{hook_name}', which is not the output of a layer"):
        _ = load_sae(content_hash=register_sae(sae)).block
