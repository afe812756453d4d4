"""What `trainer/_trl.py` relies on in TRL and transformers still exists, with the signatures it was written for."""

import ast
import inspect
from pathlib import Path

import pytest
from datasets import Dataset
from peft import LoraConfig
from tiny import make_model, preference_rows
from transformers import Trainer
from trl import DPOConfig, DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import FusedCausalLMOutput

import yapo_peft.trainer._trl as seams

# (owner, name): its parameters, and what we use it for.
METHODS = {
    (DPOTrainer, "_compute_loss"): ("model inputs return_outputs", "computes our loss, and TRL's on given scores"),
    (DPOTrainer, "compute_ref_log_probs"): ("model inputs", "scores answers without steering"),
    (DPOTrainer, "_prepare_dataset"): ("dataset processing_class args dataset_name", "checks pairs and their tokens"),
    (DPOTrainer, "_set_signature_columns_if_needed"): ("", "keeps the columns of the cache and of the samplers"),
    (Trainer, "_load_from_checkpoint"): ("resume_from_checkpoint model", "checks a checkpoint before it is loaded"),
    (Trainer, "_load_best_model"): ("", "loads the best adapter, whatever its name"),
    (Trainer, "_save"): ("output_dir state_dict", "saves the card with each model"),
    (DPOTrainer, "_save_checkpoint"): ("model trial", "saves the codes before a loss that is not finite"),
    (Trainer, "_clip_grad_norm"): ("model", "clips gradients in units of activations"),
    (Trainer, "_prepare_inputs"): ("inputs", "moves a batch outside the loop to its device"),
    (Trainer, "create_optimizer"): ("model", "gives each code its learning rate"),
    (Trainer, "evaluation_loop"): (
        "dataloader description prediction_loss_only ignore_keys metric_key_prefix",
        "reports metrics under the right prefix",
    ),
}
ATTRIBUTES = {
    "_metrics": "logs metrics of pairs",
    "_total_train_tokens": "counts the tokens of a batch once",
    "_signature_columns": "keeps the columns of the cache and of the samplers",
    "_is_vision_dataset": "rejects vision datasets with cache_activations",
    "_tag_names": "tags the model",
    "aux_loss_enabled": "asks for router logits as TRL does",
    "is_deepspeed_enabled": "rejects DeepSpeed with cache_activations",
    "is_fsdp_enabled": "rejects FSDP with cache_activations",
    "ld_alpha": "turns the weighting by length off for accuracy/zero",
    "loss_types": "lets TRL's code run for its metrics with another objective",
    "optimizer_cls_and_kwargs": "rejects optimizers whose steps depend on the gradient's size",
    "precompute_ref_logps": "makes TRL read the reference from the batch",
}
OWN = vars(seams.TRLSeams).keys() - set(dir(DPOTrainer))


@pytest.mark.parametrize(("owner", "name"), METHODS, ids=lambda value: getattr(value, "__name__", value))
def test_method_has_the_expected_signature(owner, name):
    expected, purpose = METHODS[owner, name]
    method = getattr(owner, name, None)
    assert method is not None, f"{owner.__name__}.{name} is gone; trainer/_trl.py {purpose} with it"
    found = [parameter for parameter in inspect.signature(method).parameters if parameter != "self"]
    assert found == expected.split(), f"{owner.__name__}.{name} changed; trainer/_trl.py {purpose} with it"


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, tokenizer):
    args = DPOConfig(str(tmp_path_factory.mktemp("out")), report_to="none", use_cpu=True, bf16=False)
    rows = Dataset.from_list(preference_rows(2))
    trainer = DPOTrainer(
        make_model(), args=args, train_dataset=rows, processing_class=tokenizer, peft_config=LoraConfig()
    )
    trainer._set_signature_columns_if_needed()
    return trainer


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attribute_exists(trainer, name):
    assert hasattr(trainer, name), f"DPOTrainer.{name} is gone; trainer/_trl.py {ATTRIBUTES[name]} with it"


def test_metrics_are_lists_by_mode_and_name(trainer):
    assert set(trainer._metrics) == {"train", "eval"}
    assert trainer._metrics["train"]["new"] == []


def test_a_batch_is_named_and_scored_as_expected(trainer):
    collated = trainer.data_collator([trainer.train_dataset[0]])
    assert isinstance(trainer.data_collator, DataCollatorForPreference)
    assert set(collated) == {"input_ids", "attention_mask", "completion_mask"}, "_model_inputs drops completion_mask"
    scores, given = [], {}

    def model(**kwargs):
        given.update(kwargs)
        scores.append(trainer.model(**kwargs))
        return scores[0]

    collated |= {"ref_chosen_logps": collated["input_ids"][:1, 0] * 0.0}
    collated |= {"ref_rejected_logps": collated["ref_chosen_logps"]}
    trainer.precompute_ref_logps = True
    trainer._compute_loss(model, collated, False)
    trainer.precompute_ref_logps = False
    assert set(given) == {"input_ids", "attention_mask", "labels", "use_cache", "fused_lm_head"}, "_model_inputs"
    assert len(scores) == 1, "with precompute_ref_logps, TRL takes the reference from the batch"
    assert isinstance(scores[0], FusedCausalLMOutput)
    shapes = {name: value.shape for name, value in scores[0].items() if value.dim()}
    rows = len(collated["input_ids"])
    assert all(shape[0] == rows for shape in shapes.values()), f"_trl_loss takes rows of each of {list(shapes)}"


def test_gradient_checkpointing_is_disabled_by_a_context():
    assert list(inspect.signature(disable_gradient_checkpointing).parameters) == [
        "model",
        "gradient_checkpointing_kwargs",
    ]


def test_trl_copies_an_existing_adapter_by_the_intercepted_calls():
    source = inspect.getsource(DPOTrainer.__init__)
    for call in ('model.peft_config["default"]', 'model.add_adapter("ref", ', "model.get_parameter(ref_name)"):
        assert call in source, f"no_reference_adapter keeps TRL from copying the adapter; {call} moved"


def private_names(file):
    """Attributes that start with one underscore."""
    found = {node.attr for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


def test_every_private_name_is_listed_here_and_used_in_one_file_only():
    listed = {name for _, name in METHODS} | ATTRIBUTES.keys()
    assert private_names(Path(seams.__file__)) <= listed | OWN
    theirs = {name for name in {*dir(DPOTrainer), *listed} if name.startswith("_")}
    package = Path(seams.__file__).parents[1]
    for file in [*(package / "trainer").glob("*.py"), *(package / "scripts").glob("*.py")]:
        if file.name != "_trl.py":
            assert not private_names(file) & theirs, f"{file.name}: move this to trainer/_trl.py"
