"""The vector of a code."""

from __future__ import annotations

import pytest
import torch
from tiny import D_SAE, make_sae
from torch.testing import assert_close

from yapo_peft.sae import load_sae, register_sae
from yapo_peft.steering.formula import vector_of


@pytest.fixture(scope="module")
def sae():
    return load_sae(content_hash=register_sae(make_sae()))


@pytest.fixture
def code():
    code = torch.zeros(D_SAE)
    code[[1, 5, 9]] = torch.tensor([0.5, -2.0, 1.5])
    return code


@pytest.mark.parametrize(("sign", "features"), [(None, [1, 5, 9]), (1, [1, 9]), (-1, [5])])
def test_it_sums_the_decoder_rows_of_the_entries_of_a_sign(sae, code, sign, features):
    rows = sae.decoder(torch.device("cpu"), torch.float32)
    assert_close(vector_of(code, sae, sign), sum(code[i] * rows[i] for i in features))


@pytest.mark.parametrize("sign", [None, 1, -1])
def test_nan_spreads_at_either_sign_and_infinity_at_its_own(sae, code, sign):
    code[7] = float("inf")
    assert vector_of(code, sae, sign).isfinite().all() == (sign == -1)
    code[3] = float("nan")
    assert vector_of(code, sae, sign).isnan().all()


@pytest.mark.parametrize("sign", [None, 1, -1])
def test_a_dense_code_is_its_own_vector(code, sign):
    assert torch.equal(vector_of(code, None, sign), code)


def test_it_reads_no_row_of_a_zero_code(sae):
    assert torch.equal(vector_of(torch.zeros(D_SAE), sae), torch.zeros(sae.identity.d_in))
