import numpy as np
import pytest
import torch
from peft import get_peft_model
from tiny import D_MODEL, D_SAE, make_model, make_sae, random_code, set_code

from yapo_peft import ConfigError, YaPOConfig, sweep
from yapo_peft.interpret import compare, compare_features, read_vector
from yapo_peft.interpret.regression import sparse_regression


def several(**codes):
    """A model with adapters of the given codes at layer 2: dense, or with the same SAE."""
    sae, model = make_sae(), None
    for name, code in codes.items():
        config = YaPOConfig(layers=2, sae=sae) if len(code) == D_SAE else YaPOConfig(layers=2, space="dense")
        if model is None:
            model = get_peft_model(make_model(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        set_code(model, code, name)
    return model, sae


@pytest.mark.feature("Reading", "`compare`: similarity of adapters, also of different methods")
def test_compare_codes_of_one_sae(pairs, tokenizer):
    one, two = random_code(0.5, seed=1), random_code(0.5, seed=2)
    model, sae = several(one=one, two=two)
    row = compare(model, dataset=pairs, tokenizer=tokenizer, multiplier=0.5).iloc[0]
    shared = (one != 0) & (two != 0)
    assert (row["a"], row["b"], row["layer"]) == ("one", "two", 2)
    assert (row["features_a"], row["features_b"]) == (int((one != 0).sum()), int((two != 0).sum()))
    assert row["shared"] == int(shared.sum())
    assert row["overlap"] == pytest.approx(float(shared.sum() / ((one != 0) | (two != 0)).sum()))
    assert row["same_sign"] == pytest.approx(float(((one * two) > 0).sum() / shared.sum()))
    cosine = torch.nn.functional.cosine_similarity
    decoder = sae.W_dec.detach()
    assert row["code_cosine"] == pytest.approx(float(cosine(one, two, dim=0)), abs=1e-5)
    up = [code.clamp(min=0) @ decoder for code in (one, two)]
    down = [(-code).clamp(min=0) @ decoder for code in (one, two)]
    assert row["up_cosine"] == pytest.approx(float(cosine(*up, dim=0)), abs=1e-5)
    assert row["down_cosine"] == pytest.approx(float(cosine(*down, dim=0)), abs=1e-5)
    moved = []
    for name in ("one", "two"):
        table = sweep(model, pairs, tokenizer, (0.0, 0.5), adapter_name=name).table
        margin = table.pivot_table(index="example", columns="multiplier", values="margin")
        moved.append(margin[0.5] - margin[0.0])
    assert row["effect_correlation"] == pytest.approx(np.corrcoef(*moved)[0, 1])


@pytest.mark.feature("Reading", "`compare_features`: the features of several adapters, side by side")
def test_features_are_listed_side_by_side():
    one, two, dense = torch.zeros(3, D_SAE)
    one[[3, 40, 77]] = torch.tensor([2.0, -1.5, 1.0])
    two[[40, 5]] = torch.tensor([4.0, 0.5])
    dense[[3, 9]] = torch.tensor([3.0, -6.0])
    model, sae = several(one=one, two=two, dense=dense @ make_sae().W_dec.detach())
    model.add_adapter("elsewhere", YaPOConfig(layers=1, space="dense"))
    norms = sae.W_dec.detach().norm(dim=1)
    table = compare_features(model, features=2)
    assert table.columns.tolist() == ["layer", "feature", "reach", "one", "two", "dense", "elsewhere"]
    codes = torch.stack([one, two, dense, torch.zeros(D_SAE)])
    reach = codes.abs().max(dim=0).values * norms
    order = reach.argsort(descending=True)[:5]
    assert table["feature"].tolist() == order.tolist()
    assert set(table["layer"]) == {2}
    assert table["reach"].tolist() == pytest.approx(reach[order].tolist(), rel=1e-4)
    found = torch.tensor(table[["one", "two", "dense", "elsewhere"]].to_numpy(), dtype=torch.float32).T
    assert torch.equal(found.isnan(), codes[:, order] == 0)
    torch.testing.assert_close(found.nan_to_num(), codes[:, order], rtol=1e-4, atol=1e-4)
    assert compare_features(model, ["two", "one"], top=2)["feature"].tolist() == compare_features(
        model, ["one", "two"]
    )["feature"].tolist()[:2]  # fmt: skip
    assert compare_features(model, ["dense", "elsewhere"]).empty
    model.add_adapter("other", YaPOConfig(layers=2, sae=make_sae(seed=5)))
    with pytest.raises(ConfigError, match="'one' and 'other' have different SAEs at layer 2"):
        compare_features(model, ["one", "dense", "other"])
    with pytest.raises(ConfigError, match="must be at least two names"):
        compare_features(model, ["one"])


def test_read_vector_recovers_features():
    code = torch.zeros(D_SAE)
    code[[3, 40, 77]] = torch.tensor([2.0, -1.5, 1.0])
    vector = code @ make_sae().W_dec.detach()
    model, sae = several(sparse=code, dense=vector)
    found = read_vector(model, "dense", sae_of="sparse", features=3)
    assert found["feature"].tolist() == [3, 40, 77]
    assert found["weight"].tolist() == pytest.approx([2.0, -1.5, 1.0], abs=1e-4)
    assert found["explained"].tolist() == pytest.approx([1.0] * 3)
    assert found["encoder"].tolist() == pytest.approx((vector @ sae.W_enc.detach())[[3, 40, 77]].tolist(), abs=1e-5)
    row = compare(model, features=3).iloc[0]
    assert row[["features_a", "features_b", "shared", "overlap", "same_sign"]].tolist() == [3, 3, 3, 1.0, 1.0]
    assert np.isnan(row["code_cosine"])
    assert np.isnan(row["effect_correlation"])


def test_undefined_comparisons_are_nan():
    model, _ = several(one=torch.ones(D_MODEL), two=torch.ones(D_MODEL), zero=torch.zeros(D_MODEL))
    model.add_adapter("other", YaPOConfig(layers=2, sae=make_sae(seed=5)))
    model.add_adapter("elsewhere", YaPOConfig(layers=1, space="dense"))
    set_code(model, random_code(), "other")
    table = compare(model).set_index(["a", "b"])
    assert "elsewhere" not in {name for pair in table.index for name in pair}
    assert table.loc[("one", "two"), "code_cosine"] == pytest.approx(1.0)
    assert np.isnan(table.loc[("one", "two"), "shared"])
    assert np.isnan(table.loc[("one", "zero"), "up_cosine"])
    model.add_adapter("third", YaPOConfig(layers=2, sae=make_sae(seed=6)))
    row = compare(model, ["other", "third"]).iloc[0]
    assert row[["features_a", "overlap", "code_cosine"]].isna().all()


@pytest.mark.parametrize("count", [1, 5, D_MODEL, 1000])
def test_sparse_regression_is_least_squares_on_chosen_rows(count):
    generator = torch.Generator().manual_seed(0)
    rows, vector = torch.randn(60, D_MODEL, generator=generator), torch.randn(D_MODEL, generator=generator)
    chosen, weights, explained = sparse_regression(vector, rows, count)
    assert len(chosen) == min(count, D_MODEL) == len(set(chosen.tolist()))
    best = torch.linalg.lstsq(rows[chosen].T.double(), vector[:, None].double()).solution.squeeze(-1)
    torch.testing.assert_close(weights.double(), best, atol=2e-2, rtol=1e-2)
    rest = vector - weights @ rows[chosen]
    assert explained == pytest.approx(1 - float(rest.square().sum() / vector.square().sum()), abs=1e-4)
    if 1 < count < D_MODEL:
        assert explained > sparse_regression(vector, rows, count // 2)[2]
    assert weights.abs().tolist() == sorted(weights.abs().tolist(), reverse=True)
    assert sparse_regression(torch.zeros(D_MODEL), rows, count)[2] == 0


def test_errors_name_bad_arguments():
    model, _ = several(one=random_code(), dense=torch.ones(D_MODEL))
    for adapters in (["one"], "one", ["one", "one"]):
        with pytest.raises(ConfigError, match="must be at least two names"):
            compare(model, adapters)
    with pytest.raises(ConfigError, match="adapter_name='other'"):
        compare(model, ["one", "other"])
    with pytest.raises(ConfigError, match="pass a dense adapter_name"):
        read_vector(model, "one", sae_of="dense")
    model.add_adapter("elsewhere", YaPOConfig(layers=1, space="dense"))
    with pytest.raises(ConfigError, match=r"'elsewhere' steers layers \[1\], but 'one' has SAEs at layers \[2\]"):
        read_vector(model, "elsewhere", sae_of="one")
