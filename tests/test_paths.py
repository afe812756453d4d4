"""How many of our files a reader must open to follow a call: layers of indirection that creep in show up here."""

import sys
from pathlib import Path

import torch
from peft import get_peft_model
from tiny import make_model, make_sae, random_code, random_ids, set_code

import yapo_peft
from yapo_peft import YaPOConfig, YaPOTrainer, YaPOTrainingConfig

ROOT = Path(yapo_peft.__file__).parent


def files_run(call):
    """The files of the package whose code runs in a call."""
    found = set()

    def note(frame, event, argument):
        file = Path(frame.f_code.co_filename)
        if event == "call" and file.is_relative_to(ROOT):
            found.add(file.relative_to(ROOT).as_posix())

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return sorted(found)


def steered():
    model = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae()))
    set_code(model, random_code(scale=2.0))
    return model


def test_steered_logits_pass_through_at_most_10_files():
    model = steered().eval()
    with torch.no_grad():
        found = files_run(lambda: model(random_ids()))
    assert len(found) <= 10, found


def test_cached_pair_passes_through_at_most_20_files_to_its_gradient(tmp_path, pairs, tokenizer):
    args = YaPOTrainingConfig(
        output_dir=str(tmp_path / "out"), cache_activations=True, activation_cache_dir=str(tmp_path / "cache"),
        learning_rate_unit="raw", max_kl=None, report_to="none", bf16=False, use_cpu=True,
    )  # fmt: skip
    trainer = YaPOTrainer(steered(), args, train_dataset=pairs, processing_class=tokenizer)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.train()
    found = files_run(lambda: trainer.compute_loss(trainer.model, batch).backward())
    # Its metrics are logged on the way, but not needed for the gradient.
    found.remove("trainer/metrics.py")
    assert len(found) <= 20, found
