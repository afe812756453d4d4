"""The steering of a block in a server, beside the one that adapters have in transformers."""

import pytest
import torch
from _reference.yapo import published_forward
from tiny import D_MODEL, D_SAE, SAE_KINDS
from torch.testing import assert_close

from yapo_peft.errors import UnsupportedOperationError
from yapo_peft.tuner.adapters import steered_layers
from yapo_vllm.layer import Capacity, LayerSteering, Step
from yapo_vllm.served import AdapterFile

CAPACITY = Capacity(tokens=16, slots=3, features=D_SAE)
CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.06, torch.float16: 0.01}


def block_with(folders, dtype=torch.float32, layer=2, room=CAPACITY):
    step = Step(room, CPU)
    block = LayerSteering(layer, step, room, D_MODEL, CPU, dtype)
    for slot, folder in folders.items():
        block.put(slot, AdapterFile(folder).parts(D_MODEL).get(layer))
    return block, step


def steer(block, step, h, per_token, residual=None, layers=(2,)):
    per_token = torch.as_tensor(per_token)
    step.set(per_token, layers, per_token.any(dim=0).nonzero().flatten().tolist())
    hidden, residual = h.clone(), None if residual is None else residual.clone()
    block(hidden, residual)
    return hidden if residual is None else (hidden, residual)


def expected(model, h, multiplier):
    """What the layer of an adapter in transformers makes of tokens."""
    (layer,) = [layer for layer in steered_layers(model) if layer.index == 2]
    layer.multiplier["default"] = multiplier
    with torch.no_grad():
        return layer(h[None])[0]


@pytest.mark.feature("vLLM", "Each kind of SAE, as in transformers")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("kind", SAE_KINDS)
@pytest.mark.parametrize("self_contained", [False, True])
@pytest.mark.filterwarnings("ignore:The adapter's file gets the whole encoder")
def test_each_token_of_a_batch_is_steered_at_its_multiplier(
    write_adapter, tokens, kind, normalize, dtype, self_contained
):
    folder, model = write_adapter(kind=kind, normalize=normalize, self_contained=self_contained)
    block, step = block_with({1: folder}, dtype)
    per_token = torch.zeros(7, 3)
    per_token[:, 1] = torch.tensor([1.0, -1.0, 0.0, 0.3, -2.5, 0.0, 2.0])
    h = tokens.to(dtype)
    steered = steer(block, step, h, per_token)
    for place, multiplier in enumerate(per_token[:, 1].tolist()):
        if multiplier == 0:
            assert torch.equal(steered[place], h[place])
            continue
        wanted = expected(model, h[place : place + 1], multiplier)[0]
        assert_close(steered[place], wanted, atol=TOLERANCE[dtype] * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize("multiplier", [-1.5, 0.5])
def test_steering_equals_the_published_forward(write_adapter, tokens, multiplier):
    from sae_lens import SAE

    folder, model = write_adapter()
    block, step = block_with({0: folder})
    (layer,) = steered_layers(model)
    sae = SAE.load_from_disk(model.peft_config["default"].sae_path[0])
    wanted = published_forward(tokens, layer.code("default").detach(), sae, multiplier)
    per_token = torch.zeros(7, 3)
    per_token[:, 0] = multiplier
    assert_close(steer(block, step, tokens, per_token), wanted.detach(), atol=1e-4, rtol=1e-4)


def test_several_adapters_of_a_token_add_up(write_adapter, tokens):
    one, first = write_adapter("one")
    other, second = write_adapter("other", kind="gated", seed=7)
    dense, third = write_adapter("dense", space="dense", seed=9)
    block, step = block_with({0: one, 1: other, 2: dense})
    steered = steer(block, step, tokens, torch.tensor([[1.0, -0.5, 2.0]]).expand(7, 3))
    multipliers = {first: 1.0, second: -0.5, third: 2.0}
    shifts = [expected(model, tokens, multiplier) - tokens for model, multiplier in multipliers.items()]
    assert_close(steered, tokens + sum(shifts), atol=1e-4, rtol=1e-4)


def test_sum_of_two_outputs_is_steered_without_rounding_twice(write_adapter, tokens):
    folder, model = write_adapter()
    block, step = block_with({0: folder}, torch.bfloat16)
    h, residual = tokens.bfloat16(), tokens.flip(0).bfloat16()
    per_token = torch.zeros(7, 3)
    per_token[2:5, 0] = -1.0
    hidden, total = steer(block, step, h, per_token, residual)
    wanted = expected(model, (h + residual)[2:5], -1.0)
    assert_close((hidden + total)[2:5], wanted, atol=0.06 * float(wanted.abs().max()), rtol=0)
    assert not hidden[2:5].any()
    untouched = [0, 1, 5, 6]
    assert torch.equal(hidden[untouched], h[untouched])
    assert torch.equal(total[untouched], residual[untouched])


@pytest.mark.parametrize("sign", [1, -1])
def test_a_topk_sae_without_its_encoder_steers_at_the_sign_that_lowers_nothing(write_adapter, tokens, sign):
    folder, model = write_adapter(kind="topk", sign=sign, self_contained=True)
    file = AdapterFile(folder)
    assert file.describe(1, 0, "polite", D_MODEL, 4).signs == (sign,)
    block, step = block_with({0: folder})
    per_token = torch.zeros(7, 3)
    per_token[:, 0] = 0.7 * sign
    assert_close(steer(block, step, tokens, per_token), expected(model, tokens, 0.7 * sign), atol=1e-4, rtol=1e-4)


def test_adapters_of_a_topk_sae_share_its_encoder(write_adapter, tokens, caplog):
    one, first = write_adapter("one", kind="topk", sign=1)
    other, second = write_adapter("other", kind="topk", seed=7)
    with caplog.at_level("INFO", "vllm.yapo"):
        block, step = block_with({0: one, 2: other})
    assert caplog.messages == ["Layer 2 holds the encoder of a TopK SAE: 0 MB"]
    multipliers = torch.tensor([[-1.0, 0, 0.5]]).expand(7, 3).clone()
    multipliers[3] = 0
    multipliers[4, 0] = 0
    steered = steer(block, step, tokens, multipliers)
    shifts = expected(first, tokens, -1.0) - tokens, expected(second, tokens, 0.5) - tokens
    assert_close(steered[[0, 1, 2, 5, 6]], (tokens + sum(shifts))[[0, 1, 2, 5, 6]], atol=1e-4, rtol=1e-4)
    assert_close(steered[4], (tokens + shifts[1])[4], atol=1e-4, rtol=1e-4)
    assert torch.equal(steered[3], tokens[3])
    nothing, _ = write_adapter("nothing", kind="topk", sign=0, seed=3)
    part = AdapterFile(nothing)._part(2, torch.zeros(D_SAE))
    first_alone = LayerSteering(2, step, CAPACITY, D_MODEL, CPU, torch.float32)
    first_alone.put(1, part)
    first_alone.put(0, AdapterFile(one).parts(D_MODEL)[2])
    alone = torch.tensor([[-1.0, 2.0, 0.0]]).expand(7, 3)
    assert_close(steer(first_alone, step, tokens, alone), tokens + shifts[0], atol=1e-4, rtol=1e-4)
    jump, third = write_adapter("jump", seed=4)
    block.put(2, AdapterFile(jump).parts(D_MODEL)[2])
    wanted = tokens + shifts[0] + expected(third, tokens, 0.5) - tokens
    assert_close(steer(block, step, tokens, multipliers)[:3], wanted[:3], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
@pytest.mark.parametrize("kind", ["jumprelu", "topk", "gated"])
@pytest.mark.filterwarnings("ignore:The adapter's file gets the whole encoder of a TopK SAE")
def test_features_are_held_beside_ones_that_are_moved(write_adapter, tokens, kind, normalize):
    options = {"kind": kind, "normalize": normalize}
    held, first = write_adapter("held", mode="clamp", self_contained=kind == "topk", **options)
    moved, second = write_adapter("moved", seed=7, **options)
    assert AdapterFile(held).describe(1, 0, "held", D_MODEL, 4).signs == (-1, 1)
    block, step = block_with({0: moved, 2: held})
    for multiplier in (1.0, -0.7):
        steered = steer(block, step, tokens, torch.tensor([[0.5, 0.0, multiplier]]).expand(7, 3))
        shifts = expected(first, tokens, multiplier) - tokens + expected(second, tokens, 0.5) - tokens
        assert_close(steered, tokens + shifts, atol=1e-4, rtol=1e-4)
    block.put(2, AdapterFile(moved).parts(D_MODEL)[2])
    twice = steer(block, step, tokens, torch.tensor([[0.5, 0.0, 0.5]]).expand(7, 3))
    assert_close(twice, tokens + 2 * (expected(second, tokens, 0.5) - tokens), atol=1e-4, rtol=1e-4)


def test_slot_is_reused_for_another_adapter(write_adapter, tokens):
    many, _ = write_adapter("many", kind="gated")
    folder, model = write_adapter("other", seed=4)
    block, step = block_with({0: many})
    block.put(0, AdapterFile(folder).parts(D_MODEL)[2])
    per_token = torch.tensor([[-1.0, 0.0, 0.0]]).expand(7, 3)
    assert_close(steer(block, step, tokens, per_token), expected(model, tokens, -1.0), atol=1e-4, rtol=1e-4)
    block.put(0, None)
    assert torch.equal(steer(block, step, tokens, per_token), tokens)


def test_unsteered_layer_is_unchanged(write_adapter, tokens):
    folder, _ = write_adapter()
    block, step = block_with({0: folder})
    assert torch.equal(steer(block, step, tokens, torch.ones(7, 3), layers=(1,)), tokens)
    step.clear()
    hidden = tokens.clone()
    block(hidden, None)
    assert torch.equal(hidden, tokens)


def test_shorter_step_clears_tokens_of_a_longer_one(write_adapter, tokens):
    folder, _ = write_adapter()
    block, step = block_with({0: folder})
    steer(block, step, tokens, torch.ones(7, 3))
    # As in a graph that is padded to more tokens than there are.
    step.set(torch.ones(2, 3), {2}, range(3))
    hidden = tokens.clone()
    block(hidden, None)
    assert torch.equal(hidden[2:], tokens[2:])
    assert not torch.equal(hidden[:2], tokens[:2])


def test_captured_graphs_read_all_slots(write_adapter, tokens):
    folder, _ = write_adapter()
    held, _ = write_adapter("held", mode="clamp")
    block, _ = block_with({0: folder, 1: folder, 2: held})
    (features,) = block._features.values()
    per_token = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    filled, whole = (features.shift(tokens, per_token, slots) for slots in (range(3), None))
    assert_close(filled, whole, atol=1e-5, rtol=1e-5)
    block._is_captured = True
    for kind, named in (("gated", "a gated"), ("topk", "this TopK")):
        other, _ = write_adapter(kind, kind=kind)
        with pytest.raises(UnsupportedOperationError, match=f"captured graphs do not include {named} SAE"):
            block.put(2, AdapterFile(other).parts(D_MODEL)[2])


@pytest.mark.feature("vLLM", "Multipliers far from one: nothing overflows into other tokens")
def test_large_multipliers_stay_with_their_tokens(write_adapter, tokens):
    folder, _ = write_adapter()
    block, step = block_with({0: folder}, torch.float16)
    per_token = torch.zeros(7, 3)
    per_token[3, 0] = 1000.0
    h = tokens.half()
    steered = steer(block, step, h, per_token)
    assert torch.equal(steered[[0, 1, 2, 4, 5, 6]], h[[0, 1, 2, 4, 5, 6]])


def test_the_operator_steers_within_a_compiled_graph(write_adapter, tokens, monkeypatch):
    from yapo_vllm import op

    folder, model = write_adapter()
    block, step = block_with({0: folder})
    monkeypatch.setattr(op, "_layer_named", {"yapo.2": block}.__getitem__)

    class Pair(torch.nn.Module):
        def forward(self, h):
            return h * 0.5, h * 0.5

    class One(torch.nn.Module):
        def forward(self, h):
            return h.clone()

    for module, total in ((Pair(), sum), (One(), lambda output: output)):
        op.steer_output_of(module, "yapo.2", D_MODEL)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        for multiplier in (1.0, -1.0):  # without a new trace
            step.set(torch.tensor([[multiplier, 0.0, 0.0]]).expand(7, 3), {2}, {0})
            with torch.no_grad():
                assert_close(total(compiled(tokens)), expected(model, tokens, multiplier), atol=1e-4, rtol=1e-4)


def test_unsupported_layer_outputs_raise():
    from yapo_vllm.op import steer_output_of

    block = torch.nn.Identity()
    steer_output_of(block, "yapo.2", D_MODEL)
    with pytest.raises(UnsupportedOperationError, match="Identity returns neither hidden states"):
        block(torch.zeros(3, 4, D_MODEL))
    with pytest.raises(UnsupportedOperationError, match="cannot be steered"):
        block((torch.zeros(3, D_MODEL), None))


def test_zero_codes_change_nothing(write_adapter, tokens):
    folder, model = write_adapter()
    for layer in steered_layers(model):
        layer.yapo_code["default"].data.zero_()
    model.save_pretrained(folder)
    block, step = block_with({0: folder})
    assert torch.equal(steer(block, step, tokens, torch.ones(7, 3)), tokens)
