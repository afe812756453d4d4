import pytest
import torch
from _reference.yapo import bidirectional_loss
from torch.nn.functional import logsigmoid

from yapo_peft.trainer.objective import draw_directions, pair_order, preference_margin, take_pairs


@pytest.mark.parametrize("signs", [[1, 1, 1], [-1, -1, -1], [1, -1, 1], [-1, 1, 1]])
def test_the_oriented_pair_has_the_published_loss(signs):
    directions, beta = torch.tensor(signs, dtype=torch.float), 0.3
    w, lose, ref_w, ref_l = (torch.randn(3, dtype=torch.float64) * 5 for _ in range(4))
    batch = {"input_ids": torch.arange(6)[:, None], "ref_chosen_logps": ref_w, "ref_rejected_logps": ref_l}
    oriented = take_pairs(batch, pair_order(directions))
    logps = torch.cat([w, lose])[oriented["input_ids"].squeeze(1)]
    chosen, rejected = logps.chunk(2)
    margin = preference_margin(chosen, rejected, oriented["ref_chosen_logps"], oriented["ref_rejected_logps"])
    ours = -logsigmoid(beta * margin).mean()
    torch.testing.assert_close(ours, bidirectional_loss(w, lose, ref_w, ref_l, directions, beta))


def test_orienting_swaps_rows_and_is_its_own_inverse():
    directions = torch.tensor([1.0, -1.0])
    batch = {
        "input_ids": torch.tensor([[1], [2], [3], [4]]),
        "attention_mask": torch.ones(4, 1),
        "completion_mask": torch.tensor([[1], [2], [3], [4]]),
        "ref_chosen_logps": torch.tensor([-1.0, -2.0]),
        "ref_rejected_logps": torch.tensor([-3.0, -4.0]),
    }
    once = take_pairs(batch, pair_order(directions))
    assert once["input_ids"].flatten().tolist() == [1, 4, 3, 2]
    assert once["completion_mask"].flatten().tolist() == [1, 4, 3, 2]
    assert once["ref_chosen_logps"].tolist() == [-1.0, -4.0]
    assert once["ref_rejected_logps"].tolist() == [-3.0, -2.0]
    twice = take_pairs(once, pair_order(directions))
    assert all(torch.equal(twice[name], value) for name, value in batch.items())
    order = pair_order(directions)
    assert torch.equal(order[order], torch.arange(4))


@pytest.mark.parametrize("per", ["batch", "example"])
def test_directions_depend_on_their_arguments_only(per):
    draws = [draw_directions(4, per, 42, step, micro, 0) for step in range(50) for micro in range(4)]
    again = [draw_directions(4, per, 42, step, micro, 0) for step in range(50) for micro in range(4)]
    assert all(torch.equal(a, b) for a, b in zip(draws, again, strict=True))
    assert all(set(draw.tolist()) <= {-1.0, 1.0} for draw in draws)
    assert any(len(set(draw.tolist())) == 2 for draw in draws) == (per == "example")
    assert abs(torch.cat(draws).mean()) < 0.2
    other_seed = [draw_directions(4, per, 43, step, micro, 0) for step in range(50) for micro in range(4)]
    assert any(not torch.equal(a, b) for a, b in zip(draws, other_seed, strict=True))


def test_ranks_agree_on_the_direction_of_a_batch_and_share_the_draws_of_its_examples():
    on_batch = [torch.stack([draw_directions(8, "batch", 0, step, 0, rank) for rank in range(4)]) for step in range(9)]
    assert all((draws == draws[0]).all() for draws in on_batch)
    for step in range(9):
        shares = [draw_directions(2, "example", 0, step, 0, rank) for rank in range(4)]
        assert torch.equal(torch.cat(shares), draw_directions(8, "example", 0, step, 0, 0))
