"""Which tokens of a step a worker steers, and at which blocks."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from parts_of_vllm import model_config, request
from tiny import D_MODEL, D_SAE, DEPTH, make_model

from yapo_peft.errors import (
    UnsupportedOperationError,
)
from yapo_vllm.served import AdapterFile
from yapo_vllm.worker import WorkerSteering


def runner_of(model, **changes):
    parallel = {"prefill_context_parallel_size": 1, "use_ubatching": False} | changes.pop("parallel", {})
    config = SimpleNamespace(
        model_config=model_config(),
        parallel_config=SimpleNamespace(**parallel),
        compilation_config=SimpleNamespace(pass_config=SimpleNamespace(enable_sp=False), static_forward_context={}),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
        speculative_config=None,
        additional_config={},
    )
    vars(config).update(changes)
    return SimpleNamespace(vllm_config=config, max_num_tokens=32, device=torch.device("cpu"), get_model=lambda: model)


def scheduled(new=(), finished=()):
    return SimpleNamespace(scheduled_new_reqs=list(new), finished_req_ids=set(finished))


@pytest.mark.feature("vLLM", "Token positions (all, completion, last, slices) under chunked prefill")
def test_each_adapter_of_a_request_steers_its_own_tokens(write_adapter, environment):
    sources = {name: write_adapter(name, positions=name)[0] for name in ("all", "completion", "last")}
    sources["window"] = write_adapter("window", positions="prompt[1:-1]")[0]
    environment(ADAPTERS=",".join(f"{name}={source}" for name, source in sources.items()), MAX_ADAPTERS="4")
    worker = WorkerSteering(runner_of(make_model()), settings())
    worker.follow(scheduled([request(1, 2, 3, 4, id="mixed", tokens=range(4)), request(id="plain")]))
    # Two tokens of the prompt, then the rest of it and two of the answer, as prefix caching or chunks may have it.
    for start, count in ((0, 2), (2, 4)):
        positions = torch.tensor([*range(start, start + count), 0, 1, 2])
        worker.plan(["mixed", "plain"], np.array([count, 3]), positions)
        multiplier = worker._step.multiplier[: count + 3]
        wanted = [[1.0, p >= 4, p >= 3, 1 <= p < 3] for p in range(start, start + count)] + [[0.0] * 4] * 3
        wanted = torch.tensor(wanted)
        assert torch.equal(multiplier, wanted)
        assert worker._step.on[:, 0].nonzero().flatten().tolist() == list(range(count))
    worker.follow(scheduled(finished=["mixed"]))
    worker.plan(["plain"], np.array([1]), torch.tensor([3]))
    assert not worker._step.on.any()
    assert not worker._step.layers


def settings():
    from yapo_vllm.settings import Settings

    return Settings.of()


def test_worker_steers_the_layers_of_adapters_and_the_environment(write_adapter, environment):
    environment(ADAPTERS=f"a={write_adapter()[0]}", LAYERS="0")
    runner = runner_of(make_model())
    worker = WorkerSteering(runner, settings())
    assert set(runner.vllm_config.compilation_config.static_forward_context) == {"yapo.0", "yapo.2"}
    assert runner.vllm_config.additional_config["yapo"]["layers"] == [0, 2]
    assert set(worker._layers) == {0, 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel": {"prefill_context_parallel_size": 2}}, "prefill context parallelism"),
        ({"parallel": {"use_ubatching": True}}, "microbatches"),
        ({"cache_config": SimpleNamespace(kv_sharing_fast_prefill=True)}, "kv_sharing_fast_prefill"),
        ({"additional_config": object()}, "additional_config that is not a dict"),
    ],
    ids=["context", "microbatches", "fast prefill", "config"],
)
def test_unsupported_engine_settings_raise(write_adapter, environment, changes, message):
    environment(ADAPTERS=f"a={write_adapter()[0]}")
    with pytest.raises(UnsupportedOperationError, match=message):
        WorkerSteering(runner_of(make_model(), **changes), settings())


def test_model_without_one_list_of_layers_raises(environment):
    environment(LAYERS="0")
    with pytest.raises(UnsupportedOperationError, match="Linear has 0 lists of 4 layers"):
        WorkerSteering(runner_of(torch.nn.Linear(2, 2)), settings())


def test_read_rejects_an_adapter_that_changed_while_loading(write_adapter, environment):
    folder, _ = write_adapter()
    environment(ADAPTERS=f"a={folder}", MAX_FEATURES=str(D_SAE))
    worker = WorkerSteering(runner_of(make_model()), settings())
    known = AdapterFile(folder).describe(2, 1, "b", D_MODEL, DEPTH)
    write_adapter(seed=8)
    with pytest.raises(UnsupportedOperationError, match="changed while it was being loaded"):
        worker.read(known.to_dict())
