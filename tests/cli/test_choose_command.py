"""`yapo choose`."""

import json

import pytest
import yaml
from tiny import inference_sae, make_model, make_sae

from yapo_peft.scripts.arguments import parse


@pytest.mark.feature("Commands", "`yapo choose`: the layer, SAE and number of features to train, as a config")
@pytest.mark.usefixtures("few_neutral_rows")
def test_the_command_writes_a_config_that_train_takes(run, tmp_path, tokenizer, pairs_file):
    base = tmp_path / "base"
    make_model().save_pretrained(base)
    tokenizer.save_pretrained(base)
    folders = [tmp_path / "sae-a", tmp_path / "sae-b"]
    for seed, folder in enumerate(folders):
        sae = make_sae(seed=seed)
        sae.cfg.metadata.hook_name = "blocks.2.hook_resid_post"
        inference_sae(sae, folder)

    def choose(*arguments):
        return run("choose", base, "--dataset", pairs_file, *arguments)

    saes = [part for folder in folders for part in ("--sae-path", folder)]
    options = ("--features", "4", "--steps", 8, "--max-kl", "0.001", "--out", tmp_path / "out", "--json")
    status, printed, said = choose(*saes, *options)
    assert status == 0, said
    rows = json.loads(printed)
    config = yaml.safe_load((tmp_path / "out" / "train.yaml").read_text())
    assert rows[0]["candidate"] == f"layer 2, {config['sae_path'][0].rpartition('/')[2]}, 4 features"
    assert (config["layers"], config["max_features"], config["max_kl"]) == ([2], 4, 0.001)
    assert (config["dtype"], config["seed"]) == ("auto", 0)
    assert (tmp_path / "out" / "choice.png").stat().st_size > 10_000
    assert "nats (" in said
    steering = parse(["--config", str(tmp_path / "out" / "train.yaml"), "--output_dir", str(tmp_path / "x")])[0][-1]
    assert steering.config().sae_path == config["sae_path"]
    for wrong, message in (
        (("--out", tmp_path / "y"), "There is nothing to choose from"),
        (("--layers", "1", "--out", tmp_path / "y"), "There is one candidate, layer 1, dense"),
        ((*saes, "--layers", "1", "--out", tmp_path / "y"), "the SAE is of layer 2, which --layers leaves out"),
        (("--layers", "1,2", "--sae-id", "a", "--out", tmp_path / "y"), "--sae-id a: pass the --sae-release"),
        (("--layers", "1,2", "--dtype", "float64", "--out", tmp_path / "y"), "--dtype float64: must be one of auto"),
        ((*saes, "--features", "four", "--out", tmp_path / "y"), "--features four: must be whole numbers or all"),
        (("--layers", "1,2", "--eval-split", "2", "--out", tmp_path / "y"), "must be a share"),
    ):
        status, _, said = choose(*wrong)
        assert status == 2
        assert message in said
