import json
import re

import pytest

from yapo_cli import main
from yapo_peft import SAENotFoundError
from yapo_peft.sae import find_saes
from yapo_peft.sae.directory import describe_sae
from yapo_peft.sae.loader import saes_directory

SPLITTING = "gpt2-small-res-jb-feature-splitting"
BENCH = "sae_bench_gemma-2-2b_topk_width-2pow12_date-1109"


@pytest.mark.feature("SAEs", "`yapo sae list`, `find_saes`: which SAEs of sae-lens' directory fit a model and a layer")
@pytest.mark.parametrize(
    ("model", "layer", "release", "sae_id", "l0"),
    [
        ("google/gemma-2-2b-it", 15, "gemma-scope-2b-pt-res", "layer_15/width_65k/average_l0_68", 68),
        ("google/gemma-2-9b-it", 20, "gemma-scope-9b-it-res", "layer_20/width_131k/average_l0_13", 13),
        ("google/gemma-3-1b-it", 13, "gemma-scope-2-1b-it-res", "layer_13_width_16k_l0_big", 150),
        ("google/gemma-3-1b-it", 17, "gemma-scope-2-1b-it-res", "layer_17_width_1m_l0_big", None),
        ("meta-llama/Llama-3.1-8B-Instruct", 15, "llama_scope_lxr_8x", "l15r_8x", 50),
        ("meta-llama/Llama-3.1-8B", 15, "llama_scope_lxr_32x", "l15r_32x", 50),
        ("openai-community/gpt2", 7, SPLITTING, "blocks.8.hook_resid_pre_98304", 43),
        ("Qwen/Qwen3-8B", 3, "qwen-scope-3-8b-base-w64k-l50", "layer3", 50),
        ("gemma-2-2b", 5, BENCH, "blocks.5.hook_resid_post__trainer_0", None),
        ("pythia-70m-deduped", 0, "pythia-70m-deduped-res-sm", "blocks.0.hook_resid_post", None),
    ],
)
def test_find_saes_reads_layer_and_l0_from_the_directory(model, layer, release, sae_id, l0):
    (found,) = (sae for sae in find_saes(model, layer) if (sae.release, sae.sae_id) == (release, sae_id))
    assert l0 is None or found.l0 == pytest.approx(l0, abs=0.5)
    assert found.layer == layer


def test_find_saes_lists_saes_of_the_model_itself_first():
    found = find_saes("google/gemma-2-9b-it", 20)
    assert [sae.is_of_model for sae in found] == sorted((sae.is_of_model for sae in found), reverse=True)
    assert found[0].release == "gemma-scope-9b-it-res"
    assert {sae.model for sae in found} == {"gemma-2-9b-it", "gemma-2-9b"}


def test_find_saes_lists_only_saes_of_layer_outputs():
    for model in {entry.model for entry in saes_directory().values()} - {"qwen3-4b", "qwen3-14b", "qwen3-0.6b"}:
        found = find_saes(model)
        assert found, model
        for sae in found:
            assert not re.search("transcoder|attn|mlp|-att|hook_z|lxa|lxm|temporal|mid", sae.release + sae.sae_id)


def test_find_saes_raises_for_unknown_model():
    with pytest.raises(SAENotFoundError, match=r"no SAE for 'me/mine'.*gemma-2-2b"):
        find_saes("me/mine")


def test_sae_command_lists_and_inspects(capsys, sae_folder, monkeypatch):
    assert main(["sae", "list", "google/gemma-2-2b-it", "--layer", "15", "--id", "width_65k", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert all("width_65k" in row["sae_id"] and row["layer"] == 15 for row in rows)
    assert "layer_15/width_65k/average_l0_68" in {row["sae_id"] for row in rows}
    assert main(["sae", "list", "google/gemma-2-2b-it", "--layer", "99"]) == 2
    assert "No SAE matches" in capsys.readouterr().err
    assert main(["sae", "inspect", "gemma-scope-2b-pt-res", "layer_15/width_65k/average_l0_68", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == describe_sae("gemma-scope-2b-pt-res", "layer_15/width_65k/average_l0_68")
    assert (facts["layer"], facts["l0"], facts["bytes"]) == (15, 68, None)
    files = [(f"{facts['path']}/params.npz", 300), (f"{facts['path']}/more", 4), (f"{facts['path']}0/params.npz", 9)]
    monkeypatch.setattr("yapo_peft.sae.directory._files_on_hub", {facts["repository"]: files}.__getitem__)
    wanted = ("--release", "gemma-scope-2b-pt-res", "--id", "width_65k/average_l0_68", "--layer", "15")
    assert main(["sae", "list", "google/gemma-2-2b", *wanted, "--sizes", "--json"]) == 0
    assert [row["bytes"] for row in json.loads(capsys.readouterr().out)] == [304]
    assert main(["sae", "inspect", sae_folder()]) == 0
    assert "jumprelu" in capsys.readouterr().out
    assert main(["sae", "inspect", "gemma-scope-2b-pt-res", "layer_99"]) == 2
    assert "has no SAE 'layer_99'" in capsys.readouterr().err
    assert main(["sae", "inspect", "nowhere"]) == 2
