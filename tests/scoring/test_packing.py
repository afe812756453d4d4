"""Which pairs share a row."""

import pytest
import torch

from yapo_peft.scoring.packing import _cheapest_rows


def cost(rows, sizes, attention_cost):
    length = max(sum(sizes[pair] for pair in row) for row in rows)
    return len(rows) * length * (1 + attention_cost * length)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("attention_cost", [0.0, 1e-3, 1e-1])
def test_rows_hold_every_pair_once_and_pairs_of_one_direction(seed, attention_cost):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(20, 300, (6,), generator=generator).tolist()
    directions = (torch.randint(0, 2, (6,), generator=generator) * 2.0 - 1).tolist()
    rows = _cheapest_rows(sizes, directions, attention_cost)
    assert sorted(pair for row in rows for pair in row) == list(range(6))
    assert all(len({directions[pair] for pair in row}) == 1 for row in rows)
    alone = [[pair] for pair in range(6)]
    assert cost(rows, sizes, attention_cost) <= cost(alone, sizes, attention_cost)


def test_pairs_of_one_direction_share_a_row_where_that_saves_padding():
    assert _cheapest_rows([100, 100, 200], [1.0, 1.0, -1.0], 0.0) == [[0, 1], [2]]
    assert _cheapest_rows([100, 100, 100], [1.0, 1.0, 1.0], 0.0) == [[0, 1, 2]]
    assert sorted(_cheapest_rows([100, 100, 100], [1.0, 1.0, 1.0], 1.0)) == [[0], [1], [2]]
