"""Trackers and callbacks of transformers, as users name them."""

import pytest
import torch
from peft import get_peft_model
from tiny import make_model, make_sae, trained_codes
from transformers import EarlyStoppingCallback, TrainerCallback

from yapo_peft import YaPOConfig
from yapo_peft.tuner.adapters import steered_layers


def from_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def from_wandb(folder):
    """From the calls that went to wandb: what it writes offline is read by its server only."""
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))
    return collected(wandb_calls)


def from_trackio(folder):
    from trackio.sqlite_storage import SQLiteStorage

    assert list(folder.glob("tests*.db"))
    return collected(SQLiteStorage.get_logs("tests", "run"))


def collected(entries):
    logged = {}
    for entry in entries:
        for name, value in entry.items():
            logged.setdefault(name, []).append(value)
    return logged


READERS = {"tensorboard": from_tensorboard, "wandb": from_wandb, "trackio": from_trackio}
wandb_calls = []


@pytest.fixture
def watched_wandb(monkeypatch):
    import wandb

    log = wandb.sdk.wandb_run.Run.log
    wandb_calls.clear()

    def watched(run, data, *args, **kwargs):
        wandb_calls.append(dict(data))
        return log(run, data, *args, **kwargs)

    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "log", watched)


@pytest.mark.feature("transformers", "Trackers: tensorboard, wandb, trackio")
@pytest.mark.parametrize("tracker", READERS)
def test_trackers_get_the_metrics_that_the_trainer_logs(build, pairs, tmp_path, monkeypatch, watched_wandb, tracker):
    for module in ("trackio.utils", "trackio.sqlite_storage"):  # which read their environment on import
        monkeypatch.setattr(f"{module}.TRACKIO_DIR", tmp_path)
    places = {"TENSORBOARD_LOGGING_DIR": tmp_path, "WANDB_DIR": tmp_path}
    for name, value in {**places, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, str(value))
    evaluation = {"eval_strategy": "steps", "eval_steps": 1}
    trainer = build(
        init={"eval_dataset": pairs}, direction="both", max_steps=2, **evaluation,
        report_to=tracker, run_name="run", project="tests",
    )  # fmt: skip
    trainer.train()
    logged = READERS[tracker](tmp_path)
    for name in ("loss/plus", "margin/minus", "code/nonzero", "eval_accuracy/plus", "eval_accuracy/minus", "eval_loss"):
        expected = [entry[name] for entry in trainer.state.log_history if name in entry]
        assert len(expected) == 2
        shown = name.replace("eval_", "eval/") if name.startswith("eval_") else f"train/{name}"
        assert logged[shown] == pytest.approx(expected, rel=1e-5), name


class Script(TrainerCallback):
    """Gives a metric the values of a script, so that it is known what must follow; keeps the code of each step."""

    def __init__(self, metric, values):
        self.metric, self.values, self.codes = metric, values, {}

    def on_evaluate(self, args, state, control, metrics, model, **kwargs):
        assert self.metric in metrics
        metrics[self.metric] = self.values[state.global_step - 1]
        (layer,) = steered_layers(model)
        # The best codes are evaluated again after the last step.
        self.codes.setdefault(state.global_step, layer.yapo_code[layer.active_adapters[0]].detach().clone())


def evaluated_every_step(build, pairs, script, *callbacks, model="llama"):
    return build(
        model, init={"eval_dataset": pairs, "callbacks": [script, *callbacks]}, max_steps=len(script.values),
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        metric_for_best_model=script.metric,
    )  # fmt: skip


@pytest.mark.feature("transformers", "`load_best_model_at_end` on `eval_loss` or `eval_accuracy/*`")
@pytest.mark.parametrize(("metric", "best"), [("eval_loss", 3), ("eval_accuracy/plus", 2)])
def test_best_adapter_is_loaded_at_the_end(build, pairs, metric, best):
    script = Script(metric, [0.5, 0.7, 0.2, 0.6])
    trainer = evaluated_every_step(build, pairs, script)
    trainer.train()
    assert trainer.state.best_global_step == best
    assert torch.equal(trained_codes(trainer)[0], script.codes[best])
    assert not torch.equal(script.codes[4], script.codes[best])


def test_best_adapter_of_another_name_is_loaded_at_the_end(build, pairs):
    model = get_peft_model(make_model(), YaPOConfig(layers=2, sae=make_sae()), adapter_name="polite")
    script = Script("eval_loss", [0.5, 0.7, 0.2, 0.6])
    trainer = evaluated_every_step(build, pairs, script, model=model)
    trainer.train()
    assert trainer.state.best_global_step == 3
    (layer,) = steered_layers(model)
    assert torch.equal(layer.yapo_code["polite"].detach(), script.codes[3])
    assert layer.yapo_code["polite"].requires_grad


@pytest.mark.feature("transformers", "`EarlyStoppingCallback` on `eval_loss` or `eval_accuracy/*`")
@pytest.mark.parametrize(("metric", "stopped"), [("eval_loss", 5), ("eval_accuracy/plus", 4)])
def test_training_stops_early(build, pairs, metric, stopped):
    script = Script(metric, [0.5, 0.7, 0.2, 0.6, 0.6, 0.6])
    trainer = evaluated_every_step(build, pairs, script, EarlyStoppingCallback(early_stopping_patience=2))
    trainer.train()
    assert trainer.state.global_step == stopped
