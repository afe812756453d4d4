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


@pytest.mark.feature("SAEs", "`yapo sae list`, `find_saes`: which SAEs of sae-lens' directory fit a model and a block")
@pytest.mark.parametrize(
    ("model", "layer", "release", "sae_id", "width", "l0", "size"),
    [
        ("google/gemma-2-2b-it", 15, "gemma-scope-2b-pt-res", "layer_15/width_65k/average_l0_68", 65536, 68, 1152),
        ("google/gemma-2-9b-it", 20, "gemma-scope-9b-it-res", "layer_20/width_131k/average_l0_13", 131072, 13, 3584),
        ("google/gemma-3-1b-it", 13, "gemma-scope-2-1b-it-res", "layer_13_width_16k_l0_big", 16384, 150, 144),
        ("google/gemma-3-1b-it", 17, "gemma-scope-2-1b-it-res", "layer_17_width_1m_l0_big", 1 << 20, None, 9216),
        ("meta-llama/Llama-3.1-8B-Instruct", 15, "llama_scope_lxr_8x", "l15r_8x", 32768, 50, 1024),
        ("meta-llama/Llama-3.1-8B", 15, "llama_scope_lxr_32x", "l15r_32x", 131072, 50, 4096),
        ("openai-community/gpt2", 7, SPLITTING, "blocks.8.hook_resid_pre_98304", 98304, 43, 576),
        ("Qwen/Qwen3-8B", 3, "qwen-scope-3-8b-base-w64k-l50", "layer3", 65536, 50, 2048),
        ("gemma-2-2b", 5, BENCH, "blocks.5.hook_resid_post__trainer_0", 4096, None, 72),
        ("pythia-70m-deduped", 0, "pythia-70m-deduped-res-sm", "blocks.0.hook_resid_post", None, None, None),
    ],
)  # fmt: skip
def test_what_names_and_the_directory_say(model, layer, release, sae_id, width, l0, size):
    (found,) = (sae for sae in find_saes(model, layer) if (sae.release, sae.sae_id) == (release, sae_id))
    assert found.width == width
    assert l0 is None or found.l0 == pytest.approx(l0, abs=0.5)
    assert found.size is None if size is None else found.size / 2**20 == pytest.approx(size, rel=0.02)
    assert found.layer == layer


def test_those_of_the_very_model_come_first():
    found = find_saes("google/gemma-2-9b-it", 20)
    assert [sae.is_of_model for sae in found] == sorted((sae.is_of_model for sae in found), reverse=True)
    assert found[0].release == "gemma-scope-9b-it-res"
    assert {sae.model for sae in found} == {"gemma-2-9b-it", "gemma-2-9b"}


def test_only_outputs_of_blocks_are_listed():
    """Of every model of the directory."""
    for model in {entry.model for entry in saes_directory().values()} - {"qwen3-4b", "qwen3-14b", "qwen3-0.6b"}:
        found = find_saes(model)
        assert found, model
        for sae in found:
            assert not re.search("transcoder|attn|mlp|-att|hook_z|lxa|lxm|temporal|mid", sae.release + sae.sae_id)
            assert sae.width is None or sae.width >= 512


def test_a_model_without_saes_is_named():
    with pytest.raises(SAENotFoundError, match=r"no SAE of 'me/mine'.*gemma-2-2b"):
        find_saes("me/mine")


def test_the_command_lists_and_inspects(capsys, sae_folder):
    assert main(["sae", "list", "google/gemma-2-2b-it", "--layer", "15", "--width", "65000", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["width"] for row in rows} == {65536}
    assert "layer_15/width_65k/average_l0_68" in {row["sae_id"] for row in rows}
    assert main(["sae", "list", "google/gemma-2-2b-it", "--layer", "99"]) == 2
    assert "There is none with all of that" in capsys.readouterr().err
    assert main(["sae", "inspect", "gemma-scope-2b-pt-res", "layer_15/width_65k/average_l0_68", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == describe_sae("gemma-scope-2b-pt-res", "layer_15/width_65k/average_l0_68")
    assert (facts["layer"], facts["width"], facts["bytes"]) == (15, 65536, None)
    assert main(["sae", "inspect", sae_folder()]) == 0
    assert "jumprelu" in capsys.readouterr().out
    assert main(["sae", "inspect", "gemma-scope-2b-pt-res", "layer_99"]) == 2
    assert "has no SAE 'layer_99'" in capsys.readouterr().err
    assert main(["sae", "inspect", "nowhere"]) == 2
