"""vLLM's OpenAI server with adapters, over HTTP. `make test-vllm` runs these in an environment of their own."""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from served import ADAPTERS, HAS_VLLM, expected, load_all, needs_vllm, save_adapters, save_model

if HAS_VLLM:
    import openai

pytestmark = [pytest.mark.slow, needs_vllm]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Server:
    """A server of a tiny model, and the same in transformers."""

    def __init__(self, folder, tokenizer):
        self.folder = save_model("llama", folder / "model")
        tokenizer.save_pretrained(self.folder)
        self.tokenizer = tokenizer
        self.sources = save_adapters(self.folder, folder)
        self.model = load_all(self.folder, self.sources)
        self.url = f"http://127.0.0.1:{free_port()}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)
        self.lock = threading.Lock()

    def complete(self, words, asked=None, **options):
        xargs = {} if asked is None else {"vllm_xargs": {"yapo": asked}}
        settings = {"max_tokens": 6, "temperature": 0, "logprobs": 0} | options
        extra = {"ignore_eos": True, "return_token_ids": True, **xargs}
        return self.client.completions.create(model="tiny", prompt=words, extra_body=extra, **settings).choices[0]

    def check(self, words, asked, steering):
        choice = self.complete(words, asked)
        prompt, answer = self.tokenizer(words)["input_ids"], choice.token_ids
        with self.lock:
            wanted = expected(self.model, prompt, answer, steering)
        own = wanted[range(len(answer)), answer]
        torch.testing.assert_close(torch.tensor(choice.logprobs.token_logprobs), own, atol=1e-3, rtol=1e-3)


@pytest.fixture(scope="module")
def server(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("server")
    made = Server(folder, tokenizer)
    variables = {
        "YAPO_ADAPTERS": ",".join(f"{name}={source}" for name, source in made.sources.items()),
        "YAPO_MAX_ADAPTERS": str(len(ADAPTERS) + 2),
        "VLLM_PLUGINS": "yapo",
        "YAPO_FOLDERS": f"{folder.parent},/no/such",
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(made.folder)]
    options = {
        "served-model-name": "tiny", "host": "127.0.0.1", "port": made.url.rpartition(":")[2], "dtype": "float32",
        "max-model-len": 256, "gpu-memory-utilization": 0.1, "kv-cache-memory-bytes": 2**27, "max-num-seqs": 16,
    }  # fmt: skip
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    log = folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, *arguments], env={**os.environ, **variables}, stdout=out, stderr=out, start_new_session=True
        )
    try:
        for _ in range(300):
            if process.poll() is not None:
                pytest.fail(log.read_text()[-5000:])
            try:
                if httpx.get(f"{made.url}/health").is_success:
                    break
            except httpx.HTTPError:
                time.sleep(1)
        made.process, made.log = process, log
        yield made
    finally:
        process.terminate()
        process.wait(60)


def words(seed, count=12):
    draw = random.Random(seed)
    return " ".join(f"w{draw.randrange(100)}" for _ in range(count))


@pytest.mark.feature("vLLM", "The OpenAI server: `vllm_xargs`, several multipliers at once, as in transformers")
def test_answers_at_several_multipliers_in_one_batch(server):
    cases = [(None, {})]
    cases += [(f"{name}={m}", {name: m}) for name in ADAPTERS for m in (1.0, -1.0, 0.5)]
    cases += [(["both=1", "dense=-0.5"], {"both": 1.0, "dense": -0.5}), ('{"adapter": "gated"}', {"gated": 1.0})]
    with ThreadPoolExecutor(len(cases)) as pool:
        list(pool.map(lambda case: server.check(words(1), *case), cases))


def test_chats_and_responses_are_steered(server):
    messages = [{"role": "user", "content": words(2)}]
    found = []
    for asked in ("both=2", "both=-2", None):
        extra = {"ignore_eos": True} | ({} if asked is None else {"vllm_xargs": {"yapo": asked}})
        chat = server.client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=6, temperature=0, extra_body=extra
        )
        found.append(chat.choices[0].message.content)
        streamed = server.client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=6, temperature=0, extra_body=extra, stream=True
        )
        assert "".join(part.choices[0].delta.content or "" for part in streamed if part.choices) == found[-1]
    assert len(set(found)) == 3


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("rude=1", "There is no adapter 'rude'. Served: 'answers', 'both', 'dense', 'gated', 'last'."),
        ("both=much", "'much' is not a number"),
        ("both=nan", "must be a finite number"),
        (["both=1", "both=2"], "named twice"),
        (3, "yapo=3: give"),
        ('{"adapter": "both", "strength": 2}', "unknown key 'strength'"),
        ("__import__('os').getpid()", "There is no adapter"),
    ],
)
def test_bad_requests_get_status_400_and_the_server_lives_on(server, asked, message):
    with pytest.raises(openai.BadRequestError) as refused:
        server.complete(words(3), asked)
    assert message in str(refused.value)
    server.check(words(3), "both=1", {"both": 1.0})


@pytest.mark.parametrize("kind", ["completions", "chat", "responses"])
def test_bad_requests_get_status_400_before_a_stream_begins(server, kind):
    create, asked = {
        "completions": (server.client.completions.create, {"prompt": words(3)}),
        "chat": (server.client.chat.completions.create, {"messages": [{"role": "user", "content": words(3)}]}),
        "responses": (server.client.responses.create, {"input": words(3)}),
    }[kind]
    with pytest.raises(openai.BadRequestError, match="no adapter 'rude'"):
        create(model="tiny", stream=True, extra_body={"vllm_xargs": {"yapo": "rude"}}, **asked)


def test_a_misspelt_key_is_refused_rather_than_ignored(server):
    with pytest.raises(openai.BadRequestError, match="'Yapo' is spelt 'yapo'"):
        server.client.completions.create(model="tiny", prompt=words(3), extra_body={"vllm_xargs": {"Yapo": "both=1"}})


def test_objects_are_not_among_what_the_server_takes(server):
    with pytest.raises(openai.BadRequestError, match="vllm_xargs"):
        server.complete(words(3), {"adapter": "both"})


@pytest.mark.feature("vLLM", "Beam search with steering", refused="vLLM's beam search takes no extra arguments")
def test_beam_search_is_refused_rather_than_unsteered(server):
    with pytest.raises(openai.BadRequestError, match="Beam search cannot steer"):
        server.client.completions.create(
            model="tiny", prompt=words(4), extra_body={"use_beam_search": True, "vllm_xargs": {"yapo": "both=1"}}, n=2
        )


def post(server, route, **body):
    return httpx.post(f"{server.url}/v1/{route}", json=body, timeout=60)


def test_routes_load_list_and_unload(server):
    loaded = post(server, "load_yapo_adapter", name="more", path=server.sources["both"])
    assert loaded.json()["layers"] == [1, 2]
    names = [adapter["name"] for adapter in httpx.get(f"{server.url}/v1/yapo_adapters").json()]
    assert sorted(names) == sorted([*ADAPTERS, "more"])
    server.check(words(5), "more=1", {"both": 1.0})
    broken = server.folder.parent / "broken"
    shutil.copytree(server.sources["both"], broken)
    config = json.loads((broken / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps(config | {"sae_path": ["/no/such/sae"] * 2}))
    refused = post(server, "load_yapo_adapter", name="more", path=str(broken))
    assert refused.status_code == 400
    assert "No SAE in" in refused.text
    server.check(words(6), "more=1", {"both": 1.0})
    assert post(server, "unload_yapo_adapter", name="more").json() == {"unloaded": "more"}
    assert post(server, "unload_yapo_adapter", name="more").status_code == 404
    for body, status, message in [
        ({"name": "more", "path": "/no/such/adapter"}, 400, "No adapter can be read from '/no/such/adapter'"),
        ({"name": "more", "path": "me/brief-gemma"}, 400, "in none of the folders"),
        ({"name": "more", "path": "/etc"}, 400, "in none of the folders"),
        ({"name": "a=b", "path": server.sources["both"]}, 400, "must be printable"),
        ({"name": "more"}, 400, "path"),
    ]:
        refused = httpx.post(f"{server.url}/v1/load_yapo_adapter", json=body, timeout=60)
        assert refused.status_code == status
        assert message in refused.text
    server.check(words(5), "both=1", {"both": 1.0})


def displaced_on_arrival(server):
    return [line for line in server.log.read_text().splitlines() if "has just been displaced" in line]


@pytest.mark.feature("vLLM", "Adapters loaded, displaced and unloaded under load, with no effect on running requests")
def test_adapters_come_and_go_under_load(server):
    ended, failures, late, served = threading.Event(), [], [], 0
    logged = len(displaced_on_arrival(server))

    def ask(seed):
        nonlocal served
        draw = random.Random(seed)
        while not ended.is_set():
            name, multiplier = draw.choice([*ADAPTERS]), draw.choice((-1.0, 0.5, 1.0))
            try:
                server.check(words(draw.randrange(1000)), f"{name}={multiplier}", {name: multiplier})
                served += 1
            except openai.BadRequestError as error:
                if "There is no adapter" not in str(error):  # it had to make room
                    failures.append(error)
            except openai.InternalServerError as error:
                late.append(error)
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for number in range(30):
        source = server.sources["gated" if number % 2 else "dense"]
        assert post(server, "load_yapo_adapter", name=f"extra{number % 5}", path=source).is_success
        server.check(words(number), f"extra{number % 5}=1", {"gated" if number % 2 else "dense": 1.0})
        if number % 3 == 0:
            assert post(server, "unload_yapo_adapter", name=f"extra{number % 5}").is_success
    ended.set()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    # The only requests that may fail are those whose adapter made room while they were on their way to the engine.
    assert len(late) == len(displaced_on_arrival(server)) - logged
    assert served > 50
    for name, source in server.sources.items():
        assert post(server, "load_yapo_adapter", name=name, path=source).is_success
    server.check(words(9), "both=-1", {"both": -1.0})
