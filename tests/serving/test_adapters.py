"""Adapters as servers read them, and their coming and going."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import D_MODEL, D_SAE, DEPTH, make_model

from yapo_peft.errors import (
    AdapterFileError,
    ConfigError,
    SAEMismatchError,
    SAENotFoundError,
    UnsupportedOperationError,
)
from yapo_vllm.adapters import AdapterFile, Served
from yapo_vllm.engine import EngineAdapters
from yapo_vllm.frontend import Frontend
from yapo_vllm.plugin import KEY
from yapo_vllm.worker import WorkerSteering


def model_config(d_model=D_MODEL, depth=DEPTH):
    return SimpleNamespace(
        get_hidden_size=lambda: d_model,
        hf_text_config=SimpleNamespace(num_hidden_layers=depth),
        dtype=torch.float32,
        runner_type="generate",
    )


def request(*numbers, id="r", tokens=(1, 2, 3), **asked):
    arguments = asked or ({KEY: [[number, 1.0] for number in numbers]} if numbers else None)
    return SimpleNamespace(
        request_id=id,
        req_id=id,
        client_index=0,
        sampling_params=SimpleNamespace(extra_args=arguments),
        prompt_token_ids=list(tokens),
        prompt_embeds=None,
        prompt_len=len(tokens),
        cache_salt=None,
    )


class Engine:
    """What of vLLM's `EngineCore` is used."""

    def __init__(self):
        self.vllm_config = SimpleNamespace(model_config=model_config())
        self.scheduler = SimpleNamespace(requests={})
        self.calls, self.fails = [], False

    def collective_rpc(self, method, args=()):
        if method == "yapo_read":
            self.calls.append((method, Served.from_dict(args[0])))
            if self.fails:
                raise RuntimeError("a worker failed")

    def run(self, *numbers):
        self.scheduler.requests = {str(n): request(n) for n in numbers}


def describe(folder, name="polite"):
    return AdapterFile(folder).describe(1, 0, name, D_MODEL, DEPTH)


@pytest.mark.parametrize("self_contained", [False, True])
def test_an_adapter_is_described_without_its_sae(write_adapter, self_contained, monkeypatch):
    import yapo_vllm.adapters

    folder, model = write_adapter(layers=(1, 2), positions="last", self_contained=self_contained)
    monkeypatch.setattr(yapo_vllm.adapters, "load_sae", lambda **source: pytest.fail("read an SAE"))
    found = describe(folder)
    counts = [int(p.count_nonzero()) for n, p in model.named_parameters() if "yapo_code" in n]
    assert (found.layers, found.positions, found.multiplier, found.signs) == ((1, 2), "last", 1.0, (-1, 1))
    assert found.features == max(counts)
    assert Served.from_dict(found.to_dict()) == found


def test_the_digest_is_of_what_steers(write_adapter):
    folder, _ = write_adapter("one")
    same, _ = write_adapter("same", self_contained=True)
    others = [write_adapter("code", seed=2)[0], write_adapter("tokens", positions="last")[0]]
    others += [write_adapter("sae", kind="gated")[0], write_adapter("layer", layers=(1,))[0]]
    digests = [describe(path).digest for path in (folder, *others)]
    assert describe(same).digest == digests[0]
    assert len(set(digests)) == len(digests)


def test_adapters_that_cannot_be_served_are_refused(write_adapter, tmp_path):
    folder, _ = write_adapter(layers=(3,))
    file = AdapterFile(folder)
    with pytest.raises(SAEMismatchError, match="steers block 3, and the served model has 3"):
        file.describe(1, 0, "polite", D_MODEL, 3)
    with pytest.raises(SAEMismatchError, match="width 32, and the served model's are 64 wide"):
        file.describe(1, 0, "polite", 64, DEPTH)
    get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(AdapterFileError, match="of PEFT's method LORA, not of YaPO"):
        AdapterFile(str(tmp_path / "lora"))
    weights = Path(folder, "adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(AdapterFileError, match="truncated"):
        AdapterFile(folder)


def test_another_sae_than_the_adapters_is_refused(write_adapter, tmp_path, monkeypatch):
    # Other tests hand SAEs in, which stay for the life of the process.
    monkeypatch.setattr("yapo_peft.sae.loader._registered", {})
    folder, model = write_adapter()
    sae = Path(model.peft_config["default"].sae_path[0])
    write_adapter("other", kind="standard")
    sae.rename(tmp_path / "gone")
    with pytest.raises(SAENotFoundError):
        AdapterFile(folder).parts(D_MODEL)
    (tmp_path / "sae-standard-none-2").rename(sae)
    with pytest.raises(SAEMismatchError, match="trained on another SAE"):
        AdapterFile(folder).parts(D_MODEL)


def test_a_server_checks_its_adapters_before_it_starts(write_adapter, environment):
    folder, _ = write_adapter()
    environment(ADAPTERS=f"polite={folder},gone={folder}-not")
    with pytest.raises(ConfigError, match="YAPO_ADAPTERS: 'gone' cannot be served from"):
        Frontend.at_start(model_config())
    environment(ADAPTERS=f"polite={folder}")
    assert set(Frontend.at_start(model_config()).adapters) == {"polite"}
    with pytest.raises(ConfigError, match="it is of another one"):
        Frontend.at_start(model_config(d_model=64))
    environment(ADAPTERS=f"polite={folder}", LAYERS="9")
    with pytest.raises(ConfigError, match="YAPO_LAYERS names block 9, and the served model has 4"):
        Frontend.at_start(model_config())
    environment(ADAPTERS=f"polite={folder}", MAX_FEATURES="3")
    with pytest.raises(UnsupportedOperationError, match="YAPO_MAX_FEATURES"):
        Frontend.at_start(model_config())


def test_requests_are_read_into_numbers_and_a_salt(write_adapter, environment):
    folder, _ = write_adapter()
    environment(ADAPTERS=f"polite={folder},again={folder}")
    frontend = Frontend.at_start(model_config())
    arguments = {KEY: "again=0.5", "other": 1}
    read = frontend.read(request(**arguments))
    assert read.sampling_params.extra_args == {KEY: [[2, 0.5]], "other": 1}
    assert read.cache_salt.startswith("yapo:")
    assert arguments == {KEY: "again=0.5", "other": 1}
    for plain in (request(), request(other=1), request(**{KEY: "polite=0"})):
        read = frontend.read(plain)
        assert KEY not in (read.sampling_params.extra_args or {})
        assert read.cache_salt is None
    assert frontend.read(SimpleNamespace(sampling_params=None)).sampling_params is None


def names(adapters):
    return [fields["name"] for fields in adapters]


@pytest.mark.feature("vLLM", "Loading and unloading at run time; slots are bounded, the least recently used yield")
def test_the_least_recently_used_adapter_makes_room(write_adapter, environment):
    folder, _ = write_adapter()
    environment(ADAPTERS=f"a={folder},b={folder}", MAX_ADAPTERS="3")
    engine = Engine()
    adapters = EngineAdapters(engine)
    assert names(adapters.load("c", folder)) == ["a", "b", "c"]
    assert engine.calls[-1][1].slot == 2
    assert adapters.admits(request(1))
    assert names(adapters.load("d", folder)) == ["a", "c", "d"]  # b was not asked for the longest
    assert (engine.calls[-1][1].id, engine.calls[-1][1].slot) == (4, 1)
    engine.run(3, 1)
    assert names(adapters.load("e", folder)) == ["a", "c", "e"]  # only d is in no unfinished request
    engine.run(3, 1, 5)
    with pytest.raises(UnsupportedOperationError, match="All 3 adapters are in use"):
        adapters.load("f", folder)
    assert names(adapters.served()) == ["a", "c", "e"]


def test_an_adapter_of_the_same_name_replaces_the_first_for_new_requests(write_adapter, environment):
    folder, _ = write_adapter()
    other, _ = write_adapter("other", seed=3)
    environment(ADAPTERS=f"a={folder}", MAX_ADAPTERS="2")
    engine = Engine()
    adapters = EngineAdapters(engine)
    engine.run(1)
    (found,) = adapters.load("a", other)
    assert (found["id"], found["slot"], found["source"]) == (2, 1, other)
    assert adapters.admits(request(1))  # the one that is on its way has its own
    engine.run()
    (found,) = adapters.load("a", folder)
    assert (found["id"], found["slot"]) == (3, 0)
    assert not names(adapters.unload("a"))
    with pytest.raises(ConfigError, match=r"no adapter 'a'\. Served: none"):
        adapters.unload("a")


def test_a_request_for_a_displaced_adapter_ends_with_an_error(write_adapter, environment):
    folder, _ = write_adapter()
    environment(ADAPTERS=f"a={folder}", MAX_ADAPTERS="1")
    engine = Engine()
    adapters = EngineAdapters(engine)
    adapters.load("b", folder)
    with pytest.raises(ConfigError, match="was displaced before it arrived"):
        adapters.admits(request(1))
    ended = []
    engine._send_error_outputs_to_client = lambda requests, client: ended.append((requests, client))
    assert not adapters.admits(request(1, id="late"))
    assert ended == [(["late"], 0)]
    assert adapters.admits(request(2))
    assert adapters.admits(request())


def test_a_load_that_fails_leaves_the_others_served(write_adapter, environment):
    folder, _ = write_adapter()
    environment(ADAPTERS=f"a={folder}", MAX_ADAPTERS="2")
    engine = Engine()
    adapters = EngineAdapters(engine)
    for name, source, message in [
        ("b", f"{folder}-not", "No adapter can be read from"),
        ("b,c", folder, "name is a printable text"),
        ("", folder, "name is a printable text"),
        ("b", write_adapter("elsewhere", layers=(1,))[0], "YAPO_LAYERS=1,2"),
    ]:
        with pytest.raises(Exception, match=message):
            adapters.load(name, source)
    assert not engine.calls
    engine.fails = True
    for name in ("b", "a", "a"):
        with pytest.raises(RuntimeError):
            adapters.load(name, folder)
    assert names(adapters.served()) == ["a"]
    assert adapters.admits(request(1))
    engine.fails = False
    assert names(adapters.load("b", folder)) == ["a", "b"]


def test_a_server_without_steering_says_how_to_start_it(environment):
    adapters = EngineAdapters(Engine())
    assert adapters.served() == []
    assert adapters.admits(request())
    with pytest.raises(UnsupportedOperationError, match="start it with YAPO_ADAPTERS, or YAPO_LAYERS"):
        adapters.load("a", "folder")


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


@pytest.mark.feature("vLLM", "Token positions (all, completion, last) under chunked prefill")
def test_each_adapter_of_a_request_steers_its_own_tokens(write_adapter, environment):
    sources = {name: write_adapter(name, positions=name)[0] for name in ("all", "completion", "last")}
    environment(ADAPTERS=",".join(f"{name}={source}" for name, source in sources.items()), MAX_ADAPTERS="3")
    worker = WorkerSteering(runner_of(make_model()), settings())
    worker.follow(scheduled([request(1, 2, 3, id="mixed", tokens=range(4)), request(id="plain")]))
    # Two tokens of the prompt, then the rest of it and two of the answer, as prefix caching or chunks may have it.
    for start, count in ((0, 2), (2, 4)):
        positions = torch.tensor([*range(start, start + count), 0, 1, 2])
        worker.plan(["mixed", "plain"], np.array([count, 3]), positions)
        strength = worker._step.strength[: count + 3]
        wanted = torch.tensor([[1.0, p >= 4, p >= 3] for p in range(start, start + count)] + [[0.0, 0.0, 0.0]] * 3)
        assert torch.equal(strength, wanted)
        assert worker._step.on[:, 0].nonzero().flatten().tolist() == list(range(count))
    worker.follow(scheduled(finished=["mixed"]))
    worker.plan(["plain"], np.array([1]), torch.tensor([3]))
    assert not worker._step.on.any()
    assert not worker._step.layers


def settings():
    from yapo_vllm.settings import Settings

    return Settings.of()


def test_a_worker_steers_the_blocks_that_adapters_and_the_environment_name(write_adapter, environment):
    environment(ADAPTERS=f"a={write_adapter()[0]}", LAYERS="0")
    runner = runner_of(make_model())
    worker = WorkerSteering(runner, settings())
    assert set(runner.vllm_config.compilation_config.static_forward_context) == {"yapo.0", "yapo.2"}
    assert runner.vllm_config.additional_config["yapo"]["layers"] == [0, 2]
    assert set(worker._blocks) == {0, 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel": {"prefill_context_parallel_size": 2}}, "prefill context parallelism"),
        ({"parallel": {"use_ubatching": True}}, "microbatches"),
        ({"cache_config": SimpleNamespace(kv_sharing_fast_prefill=True)}, "kv_sharing_fast_prefill"),
        ({"additional_config": object()}, "additional_config that is no dict"),
    ],
    ids=["context", "microbatches", "fast prefill", "config"],
)
def test_engines_that_steering_does_not_follow_are_refused(write_adapter, environment, changes, message):
    environment(ADAPTERS=f"a={write_adapter()[0]}")
    with pytest.raises(UnsupportedOperationError, match=message):
        WorkerSteering(runner_of(make_model(), **changes), settings())


def test_a_model_without_one_list_of_blocks_is_refused(environment):
    environment(LAYERS="0")
    with pytest.raises(UnsupportedOperationError, match="Linear has 0 lists of 4 blocks"):
        WorkerSteering(runner_of(torch.nn.Linear(2, 2)), settings())


def test_an_adapter_that_changed_on_the_way_is_refused(write_adapter, environment):
    folder, _ = write_adapter()
    environment(ADAPTERS=f"a={folder}", MAX_FEATURES=str(D_SAE))
    worker = WorkerSteering(runner_of(make_model()), settings())
    known = AdapterFile(folder).describe(2, 1, "b", D_MODEL, DEPTH)
    write_adapter(seed=8)
    with pytest.raises(UnsupportedOperationError, match="changed while it was being loaded"):
        worker.read(known.to_dict())
