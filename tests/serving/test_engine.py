"""Adapters that come and go while others are in use."""

from types import SimpleNamespace

import pytest
from parts_of_vllm import model_config, request

from yapo_peft.errors import (
    ConfigError,
    UnsupportedOperationError,
)
from yapo_vllm.engine import EngineAdapters
from yapo_vllm.served import Served


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
        ("b,c", folder, "must be printable"),
        ("", folder, "must be printable"),
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
