"""`yapo compare` on saved adapters gives the same results as the library."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from peft import AutoPeftModelForCausalLM

from yapo_peft import sweep
from yapo_peft.evaluation import Damage, at_matched_damage


@pytest.mark.feature("Commands", "`yapo compare`: adapters at equal damage, with intervals and a plot")
def test_compare_matches_the_library(run, saved_adapter, tokenizer, pairs, pairs_file, tmp_path):
    (tmp_path / "text.txt").write_text("w1 w2 w3 w4 w5 w6 " * 100)
    fit = ("--dataset", pairs_file, "--model", tmp_path / "base", "--layers", 1, "--out", tmp_path / "caa")
    assert run("fit", "caa", *fit)[0] == 0
    adapters = {"adapter": saved_adapter, "caa": tmp_path / "caa"}
    options = ("--dataset", pairs_file, "--text", tmp_path / "text.txt", "--multipliers", "-4,-1,0,1,4")
    plot = tmp_path / "gains.png"
    status, printed, stderr = run(
        "compare", *adapters.values(), *options, "--levels", "0.001,90", "--json", "--plot", plot
    )
    assert status == 0, stderr
    found = pd.DataFrame(json.loads(printed))
    assert plot.stat().st_size > 1000
    for name, folder in adapters.items():
        model = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
        effect = sweep(model, pairs, tokenizer, (-4.0, -1.0, 0.0, 1.0, 4.0)).gains("margin")
        text = [(tmp_path / "text.txt").read_text()]
        damage = sweep(model, text, tokenizer, (-4.0, -1.0, 0.0, 1.0, 4.0), measure=Damage())
        for side in ("up", "down"):
            expected = at_matched_damage(effect, damage, [0.001, 90], metric="gain", negative=side == "down")
            rows = found[(found["adapter"] == name) & (found["direction"] == side)]
            for column in ("kl", "multiplier", "gain", "gain_low", "gain_high"):
                np.testing.assert_allclose(rows[column].astype(float), expected[column], rtol=1e-4)
            differences = {row["kl"]: row["difference"] for row in rows.to_dict("records")}
            gains = found[(found["direction"] == side) & (found["kl"] == 0.001)].set_index("adapter")["gain"]
            assert differences[0.001] == pytest.approx(gains[name] - gains["adapter"], rel=1e-4)
            at = "+" if side == "up" else "-"
            assert re.search(
                rf"{re.escape(name)} reaches a KL of [\d.e-]+ at \{at}, not 90: extend --multipliers", stderr
            )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--multipliers", "1,2"), "must be on both sides of 0, and 0"),
        (("--levels", "0"), "must be positive"),
        (("--plot", "gains.xyz"), "xyz"),
        ((), "an adapter is given twice"),
    ],
)
def test_compare_rejects_bad_options_before_loading(run, options, message):
    status, _, stderr = run("compare", "a", "a" if not options else "b", "--dataset", "pairs.csv", *options)
    assert status == 2
    assert message in " ".join(stderr.split())
