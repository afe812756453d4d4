"""Temporary forward hooks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from yapo_peft.tuner.hooks import forward_hooks


def test_hooks_change_outputs_for_the_time_of_the_block():
    module, seen = nn.Identity(), []
    module.register_forward_hook(lambda module, args, output: output + 1)
    with forward_hooks([(module, seen.append)], prepend=True), forward_hooks([(module, lambda output: output * 10)]):
        changed = module(torch.ones(1))
    assert seen == [1]
    assert changed == 20
    assert module(torch.ones(1)) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupt_while_hooks_are_registered_leaves_none(error):
    module = nn.Identity()

    def interrupted():
        yield module, print
        raise error

    with pytest.raises(error), forward_hooks(interrupted()):
        pass
    assert not module._forward_hooks
