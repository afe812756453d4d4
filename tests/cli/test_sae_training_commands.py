"""`yapo sae train` and `yapo sae measure`."""

import json

import datasets
import pytest
import torch
from datasets import Dataset
from tiny import inference_sae, make_model, make_sae

SETTINGS = (
    "--d-sae", 64, "--l0", 8, "--tokens", 2560, "--batch-size", 128, "--buffer", 2048, "--context", 16,
)  # fmt: skip


@pytest.fixture
def sources(tmp_path, tokenizer):
    """A model, and text in four forms."""
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    lines = [" ".join(f"w{i * i % 97}" for i in range(start, start + 40)) for start in range(0, 3200, 40)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    rows = [f"w{i} w{i + 1},w{i} w2 w3 w4,w5 w6 w7 w8" for i in range(90)]
    (tmp_path / "pairs.csv").write_text("\n".join(["question,right,wrong", *rows]))
    chats = [[{"role": "user", "content": f"w{i} w9"}, {"role": "assistant", "content": "w1 w2"}] for i in range(30)]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"talk": chat}) for chat in chats))
    Dataset.from_dict({"text": [f"w{i} w3 w1 w4 w1 w5" for i in range(40)]}).save_to_disk(tmp_path / "saved")
    return tmp_path


def test_saes_are_trained_on_text_of_all_kinds_measured_and_continued(run, sources, monkeypatch):
    from yapo_peft.sae_training import training

    monkeypatch.chdir(sources)
    read, prepare = [], training.held_out_rows

    def kept(texts, *arguments):
        read.extend(texts)
        return prepare(read, *arguments)

    monkeypatch.setattr(training, "held_out_rows", kept)
    datasets = [
        argument
        for name in ("text.txt", "pairs.csv:question:right,wrong", "chats.jsonl:talk", "saved")
        for argument in ("--dataset", name)
    ]
    status, out, err = run("sae", "train", "model", "--layers", "1,2", *datasets, "--out", "saes", *SETTINGS)
    assert status == 0, err
    assert "saes/layer_1: explained variance 0." in out
    assert len(read) == 3 + 2 * 90 + 30 + 40
    # The sources are read in turn, a long text file in pieces.
    assert [type(text) for text in read[:5]] == [str, dict, list, dict, str]
    prompt = [{"role": "user", "content": "w0 w1"}]
    assert [text for text in read if isinstance(text, dict) and text.get("prompt") == prompt] == [
        {"prompt": prompt, "completion": "w0 w2 w3 w4"},
        {"prompt": prompt, "completion": "w5 w6 w7 w8"},
    ]
    assert "".join(text for text in read if isinstance(text, str)) == (sources / "text.txt").read_text()

    status, out, err = run("sae", "measure", "model", "saes/layer_2", "--dataset", "text.txt", "--json")
    assert status == 0, err
    assert json.loads(out)["tokens"] > 300

    assert (
        "trained on layer 2, not on 1"
        in run("sae", "measure", "model", "saes/layer_2", "--dataset", "text.txt", "--layer", 1, "--tokens", 50)[2]
    )

    more = ("--from", "saes/layer_2", "--dataset", "text.txt", "--tokens", 640, *SETTINGS[6:])
    status, out, err = run("sae", "train", "model", *more, "--out", "more")
    assert status == 0, err
    assert "more/layer_2: " in out
    assert "| layer 2, before | layer 2 |" in (sources / "more" / "README.md").read_text()


def test_streamed_text_is_read_until_there_is_enough(run, sources, monkeypatch):
    """A Hub dataset, of which only what is needed is read."""

    def load_dataset(name, config, split, streaming):
        assert (name, config, split, streaming) == ("some/stories", "short", "train", True)
        return datasets.IterableDataset.from_generator(stories)

    def stories():
        for i in range(10**9):
            yield {"story": f"w{i} w3 w1 w4 w1 w5 w9 w2"}

    monkeypatch.setattr("yapo_cli.texts.load_dataset", load_dataset)
    monkeypatch.chdir(sources)
    options = ("--layers", "1", "--dataset", "some/stories/short:story", "--out", "saes", *SETTINGS)
    status, _, err = run("sae", "train", "model", *options)
    assert status == 0, err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "model", "--dataset", "text.txt"), "pass --layers, such as 14, or --from an SAE"),
        (("train", "model", "--dataset", "text.txt:words", "--layers", "1"), "a text file has no columns"),
        (("train", "model", "--dataset", "pairs.csv:questions:right", "--layers", "1"), "no column 'questions'"),
        (("train", "model", "--dataset", "pairs.csv:a:b:c", "--layers", "1"), "name one column, or those of prompts"),
        (("train", "model", "--dataset", "pairs.csv", "--layers", "1"), "there is no column 'text' among"),
        (
            ("train", "model", "--dataset", "text.txt", "--from", "sae", "--layers", "1,2"),
            "is given 1 times for 2 layers",
        ),
        (("train", "model", "--dataset", "text.txt", "--from", "nothing"), "No SAE in 'nothing'"),
        (("measure", "model", "sae", "--dataset", "text.txt", "--layer", "7"), "but the model has 4 layers"),
        (("measure", "model", "narrow", "--dataset", "text.txt"), "reads width 16"),
        (("measure", "model", "sae", "--dataset", "text.txt", "--device", "cuda:7"), "--device cuda:7: "),
        (("measure", "model", "sae", "--dataset", "text.txt", "--device", "gpu"), "--device gpu: "),
    ],
)
def test_what_cannot_be_trained_on_is_named(run, sources, monkeypatch, arguments, message):
    monkeypatch.chdir(sources)
    inference_sae(make_sae(layer=1), sources / "sae")
    inference_sae(make_sae(layer=1, d_in=16), sources / "narrow")
    out = ("--out", "saes") if arguments[0] == "train" else ()
    status, _, err = run("sae", *arguments, *out)
    assert status in (1, 2)
    assert message in " ".join(err.replace("│", " ").split())


def test_saes_whose_training_has_not_ended_are_not_pushed(run, tmp_path):
    (tmp_path / "layer_1").mkdir()
    (tmp_path / "layer_1" / "measures.json").write_text("{}")
    status, _, err = run("push", tmp_path, "me/saes")
    assert status == 2
    assert "has not ended: repeat its command" in " ".join(err.split())


def test_device_moves_the_model(run, sources, monkeypatch):
    monkeypatch.chdir(sources)
    inference_sae(make_sae(layer=1), sources / "sae")
    status, _, err = run("sae", "measure", "model", "sae", "--dataset", "text.txt", "--device", "cpu")
    assert status == 0, err
    moved = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *where, **options: moved.append(where) or self)
    run("sae", "measure", "model", "sae", "--dataset", "text.txt", "--device", "cuda:7")
    assert ("cuda:7",) in moved
