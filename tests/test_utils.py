"""Helpers that several packages share."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from peft import get_peft_model
from tiny import make_model, make_sae, random_code, set_code

from yapo_peft import YaPOConfig, sweep
from yapo_peft._utils import hash_model, remove_leftovers, replacing
from yapo_peft.interpret import attribute, explain
from yapo_peft.methods import measure_contrast


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize(
    "look",
    [
        sweep,
        measure_contrast,
        attribute,
        lambda model, pairs, tokenizer: explain(model, tokenizer=tokenizer, texts=pairs),
    ],
    ids=["sweep", "measure_contrast", "attribute", "explain"],
)
def test_modules_stay_in_the_mode_that_they_were_in(look, is_training, pairs, tokenizer):
    model = get_peft_model(make_model("gpt2").train(is_training), YaPOConfig(layers=2, sae=make_sae()))
    set_code(model, random_code())
    # What makes it necessary to look at each of them.
    assert model.training
    before = [module.training for module in model.modules()]
    assert is_training or not all(before)
    look(model, pairs, tokenizer)
    assert [module.training for module in model.modules()] == before


def test_sampled_hash_notices_a_code_that_differs_only_at_its_end():
    model = make_model()
    model.register_parameter("code", torch.nn.Parameter(torch.zeros(1 << 16)))
    before = hash_model(model, sampled=True)
    with torch.no_grad():
        model.code[-1] = 1.0
    assert hash_model(model, sampled=True) != before


def test_a_process_that_is_killed_leaves_the_file_as_it_was_and_its_partial_one_goes_after_a_day(tmp_path):
    file = tmp_path / "scores [1].json"
    with replacing(file) as partial:
        partial.write_text("old")
    code = (
        "import os, signal\nfrom pathlib import Path\nfrom yapo_peft._utils import replacing\n"
        f"with replacing(Path({str(file)!r})) as partial:\n"
        "    partial.write_text('half of it')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    (left,) = tmp_path.glob("*.partial")
    for age, expected in ((3600, True), (25 * 3600, False)):
        os.utime(left, (time.time() - age,) * 2)
        with replacing(file) as partial:
            partial.write_text("new")
        assert left.exists() == expected
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert file.read_text() == "new"


def test_partial_folders_go_too(tmp_path):
    folder, other = tmp_path / "adapter.1.partial", tmp_path / "other"
    for place in (folder, other):
        place.mkdir()
        (place / "file").write_text("")
        os.utime(place, (0, 0))
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [other]


def test_content_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    file, happened = tmp_path / "file", []
    monkeypatch.setattr(os, "fsync", lambda number: happened.append(("synced", file.exists())))
    with replacing(file) as partial:
        partial.write_text("content")
    assert happened == [("synced", False)]
