import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from processes import RUNS
from tiny import make_model, make_sae, preference_rows
from torch.testing import assert_close
from transformers.integrations import is_deepspeed_available

from yapo_peft import register_sae
from yapo_peft.tuner.adapters import steered_layers

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """Where one process and two have trained, and each has gone on from the other's checkpoints."""
    folder = tmp_path_factory.mktemp("processes")
    Dataset.from_list(preference_rows(16)).save_to_disk(folder / "train")
    Dataset.from_list(preference_rows(5, seed=5)).save_to_disk(folder / "test")
    tokenizer.save_pretrained(folder / "tokenizer")
    for extra in ([], ["resume"]):
        for world in (1, 2):
            launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"] if world == 2 else []
            command = [sys.executable, *launcher, str(HERE / "processes.py"), str(folder), str(world), *extra]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent), "DS_ACCELERATOR": "cpu"}
            run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
            assert run.returncode == 0, run.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def results(folder):
    """By kind, number of processes and rank."""
    return {tuple(path.stem.split("-")): torch.load(path, weights_only=False) for path in folder.glob("*-[12]-?.pt")}


@pytest.mark.feature("Many processes", "DDP: the trajectory of one process with the same global batch, codes identical")
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(results, name):
    alone, first, second = (results["trained", *key][name] for key in (("1", "0"), ("2", "0"), ("2", "1")))
    assert first["model"] == "DistributedDataParallel"
    assert torch.equal(first["codes"], second["codes"])
    assert_close(first["codes"], alone["codes"], rtol=1e-4, atol=1e-5)
    assert len(alone["log"]) == 4
    assert_close(first["log"], alone["log"], rtol=1e-3, atol=1e-6)


@pytest.mark.feature("Many processes", "DeepSpeed ZeRO-1, -2 and -3, with the trajectory of one process")
@pytest.mark.skipif(not is_deepspeed_available(), reason="needs deepspeed")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_trains_as_one_process(folder, results, stage):
    alone, first = results["trained", "1", "0"]["batch"], results["trained", "2", "0"][f"zero {stage}"]
    assert first["model"] == "DeepSpeedEngine"
    assert_close(first["codes"], alone["codes"], rtol=1e-3, atol=1e-5)
    register_sae(make_sae(seed=2))
    (layer,) = steered_layers(PeftModel.from_pretrained(make_model(), folder / f"zero {stage}-2"))
    assert torch.equal(layer.yapo_code["default"], first["codes"][0])


@pytest.mark.feature("Many processes", "Evaluation at fixed signs counts each pair once, also where they do not divide")
@pytest.mark.skipif(not is_deepspeed_available(), reason="DeepSpeed is not installed")
def test_deepspeed_takes_the_steps_of_one_process_with_a_budget(results):
    alone, first = results["trained", "1", "0"]["budget"], results["trained", "2", "0"]["zero with a budget"]
    losses = [[entry["loss"] for entry in run["log"]] for run in (first, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("name", RUNS)
def test_evaluation_counts_each_pair_once(results, name):
    alone, together = (results["trained", world, "0"][name]["evaluated"] for world in "12")
    assert len(alone) == 8
    assert together == pytest.approx(alone, rel=1e-4, abs=1e-4)


@pytest.mark.feature("Many processes", "Adapters are saved once")
def test_the_saved_adapter_is_the_trained_one(folder, results):
    assert not list((folder / "two layers-2").glob("**/*rank*"))
    for seed in RUNS["two layers"]["layers"]:
        register_sae(make_sae(seed=seed))
    loaded = steered_layers(PeftModel.from_pretrained(make_model(), folder / "two layers-2"))
    codes = torch.stack([layer.yapo_code["default"] for layer in loaded])
    assert torch.equal(codes, results["trained", "2", "0"]["two layers"]["codes"])


@pytest.mark.feature("Many processes", "Checkpoints resume on another number of processes")
@pytest.mark.parametrize("name", ["batch", "example"])
@pytest.mark.parametrize("world", ["1", "2"])
def test_checkpoint_resumes_on_another_number_of_processes(results, name, world):
    resumed = results["resumed", world, "0"]["resumed"][name]["codes"]
    assert_close(resumed, results["trained", "1", "0"][name]["codes"], rtol=1e-4, atol=1e-5)


@pytest.mark.feature("Many processes", "A loss that is not finite in one process stops all of them")
def test_all_processes_stop_together(results):
    messages = [results["trained", "2", rank]["broken"] for rank in "01"]
    assert messages[0] == messages[1]
    assert "The loss is nan in step 3" in messages[0]
    assert "checkpoint-2" in messages[0]


@pytest.mark.feature("Many processes", "FSDP2's `fully_shard`, also of a bf16 model: same logits, gradients and files")
@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
def test_sharding_changes_nothing(results, dtype):
    for rank in "01":
        whole, sharded = results["trained", "2", rank]["sharded"][dtype]
        assert all(torch.equal(*pair) for pair in zip(whole[:2], sharded[:2], strict=True))
        assert whole[2].keys() == sharded[2].keys()
        assert all(torch.equal(whole[2][name], sharded[2][name]) for name in whole[2])
