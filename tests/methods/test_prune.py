import pytest
import torch
from peft import get_peft_model
from tiny import D_SAE, make_model, make_sae, random_code, set_code

from yapo_peft import ConfigError, YaPOConfig
from yapo_peft.methods import prune
from yapo_peft.tuner.adapters import steered_layers


def steered(layers, saes):
    model = get_peft_model(make_model(), YaPOConfig(layers=layers, sae=saes))
    set_code(model, random_code(0.8))
    return model


@pytest.mark.feature("Methods", "`prune`: the features of an adapter that move activations the furthest")
@pytest.mark.parametrize("k", [1, 10, 1000])
def test_prune_keeps_furthest_reaching_features_across_layers(k):
    saes = [make_sae(seed=0), make_sae(seed=1)]
    saes[1].W_dec.data *= torch.rand(D_SAE, 1) * 3
    model = steered([1, 3], saes)
    reach = torch.cat([random_code(0.8).abs() * sae.W_dec.detach().norm(dim=1) for sae in saes])
    prune(model, k)
    codes = torch.cat([layer.yapo_code["default"].detach() for layer in steered_layers(model)])
    kept = reach.topk(min(k, int((reach > 0).sum()))).indices
    expected = torch.zeros(2 * D_SAE)
    expected[kept] = torch.cat([random_code(0.8)] * 2)[kept]
    assert torch.equal(codes, expected)


@pytest.mark.parametrize("k", [1, 10, 1000])
def test_rescale_preserves_norm_of_either_sign(k):
    saes = [make_sae(seed=0), make_sae(seed=1)]
    plain, rescaled = steered([1, 3], saes), steered([1, 3], saes)
    prune(plain, k)
    prune(rescaled, k, rescale=True)
    for before, after, sae in zip(steered_layers(plain), steered_layers(rescaled), saes, strict=True):
        kept, code = before.yapo_code["default"].detach(), after.yapo_code["default"].detach()
        for side in (kept > 0, kept < 0):
            if not side.any():
                assert not code[side].any()
                continue
            factor = code[side] / kept[side]
            torch.testing.assert_close(factor, factor[:1].expand_as(factor))
            whole = random_code(0.8)
            whole = whole * (whole.sign() == kept[side][0].sign())
            torch.testing.assert_close(
                (code[side] @ sae.W_dec.detach()[side]).norm(), (whole @ sae.W_dec.detach()).norm()
            )


def test_rescale_is_bounded_when_entries_nearly_cancel():
    sae = make_sae()
    sae.W_dec.data[1] = -sae.W_dec.data[0] * 0.999999
    model = steered(2, sae)
    code = torch.zeros(D_SAE)
    code[:3] = torch.tensor([5.0, 5.0, 1.0])
    set_code(model, code)
    prune(model, 2, rescale=True)
    kept = steered_layers(model)[0].yapo_code["default"].detach()
    lengths = sae.W_dec.detach().norm(dim=1)[:3]
    most = (code[:3] * lengths).sum() / (code[:2] * lengths[:2]).sum()
    torch.testing.assert_close(kept[:2], code[:2] * most)


def test_errors_name_bad_arguments():
    model = steered(2, make_sae())
    model.add_adapter("dense", YaPOConfig(layers=1, space="dense"))
    with pytest.raises(ConfigError, match="max_features=0: must be a whole number"):
        prune(model, 0)
    with pytest.raises(ConfigError, match=r"max_features=1.5: must be a whole number"):
        prune(model, 1.5)
    with pytest.raises(ConfigError, match="Pruning needs space='sae', but adapter 'dense'"):
        prune(model, 5, "dense")
