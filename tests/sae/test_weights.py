import pytest
import torch
from tiny import D_MODEL, SAE_KINDS, inference_sae, make_sae

from yapo_peft.sae import load_sae
from yapo_peft.sae.loader import _extract


@pytest.mark.parametrize("kind", SAE_KINDS)
@pytest.mark.parametrize("b_dec_to_input", [True, False])
def test_encode_matches_sae_lens(kind, b_dec_to_input, tmp_path):
    sae = inference_sae(make_sae(kind, apply_b_dec_to_input=b_dec_to_input), tmp_path)
    weights, _ = _extract(sae)
    h = torch.randn(3, 5, D_MODEL) * 3
    features, scale = weights.encode(h)
    assert scale is None
    assert 0 < features.count_nonzero() < features.numel()
    torch.testing.assert_close(features, sae.encode(h), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalization", ["layer_norm", "constant_norm_rescale"])
def test_encode_returns_scale_of_decoder_output(normalization):
    sae = make_sae("standard", normalize_activations=normalization)
    weights, _ = _extract(sae)
    h = torch.randn(3, 5, D_MODEL) * 3
    features, scale = weights.encode(h)
    with torch.no_grad():
        torch.testing.assert_close(features, sae.encode(h), rtol=1e-4, atol=1e-5)
        whole = sae.decode(features)
        sae.encode(h)
        without = sae.decode(torch.zeros_like(features))
    torch.testing.assert_close((features @ weights.W_dec) * scale, whole - without, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_decoder_norms_are_folded_in(kind, rescale, tmp_path):
    raw = make_sae(kind, rescale_acts_by_decoder_norm=rescale)
    raw.W_dec.data *= torch.rand(len(raw.W_dec), 1) + 0.5
    before = {name: value.clone() for name, value in raw.state_dict().items()}
    weights, _ = _extract(raw)
    sae = inference_sae(raw, tmp_path)
    h = torch.randn(4, D_MODEL) * 3
    features, _ = weights.encode(h)
    with torch.no_grad():
        torch.testing.assert_close(features @ weights.W_dec + sae.b_dec, sae(h), rtol=1e-4, atol=1e-5)
    # Registering or saving an SAE must not change it.
    for name, value in raw.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_weights_are_copied_once_per_device_and_dtype(sae_folder):
    frozen = load_sae(path=sae_folder("jumprelu"))
    cpu = torch.device("cpu")
    pairs = zip(
        frozen.weights(cpu, torch.bfloat16).tensors(), frozen.weights(cpu, torch.bfloat16).tensors(), strict=True
    )
    assert all(first is second for (_, first), (_, second) in pairs)
    assert frozen.decoder(cpu, torch.bfloat16) is frozen.weights(cpu, torch.bfloat16).W_dec
    assert frozen.weights(cpu, torch.bfloat16).W_dec.dtype == torch.bfloat16
    native = frozen.weights(cpu, torch.float32)
    assert native.W_dec.data_ptr() == frozen._native.W_dec.data_ptr()
    assert not any(value.requires_grad for _, value in native.tensors())
