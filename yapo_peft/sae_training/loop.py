"""The loop that trains SAEs of several layers on the same tokens, with checkpoints, a progress bar and a tracker."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from .._utils import partial_of
from .activations import ActivationStream
from .config import SAETrainingConfig

if TYPE_CHECKING:
    from sae_lens import TrainingSAE
    from sae_lens.training.sae_trainer import SAETrainer

_STREAM, _NAME = "stream.json", re.compile(r"checkpoint-(\d+)")
# Steps between the numbers of the progress bar and of the tracker.
_LOGGED = 20


class TrainingLoop:
    """Trains SAEs of several layers in step.

    sae-lens' trainer of each has the optimizer, the schedules and the counts of what is active; its callers feed it,
    save it and say how it does.
    """

    def __init__(
        self,
        saes: Mapping[int, TrainingSAE[Any]],
        scales: Mapping[int, float],
        stream: ActivationStream,
        config: SAETrainingConfig,
        folder: Path,
        device: torch.device,
    ) -> None:
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        settings = SAETrainerConfig(
            total_training_samples=config.steps * config.batch_size,
            train_batch_size_samples=config.batch_size,
            lr=config.learning_rate,
            lr_end=config.learning_rate,  # must be given, and is not read by the schedule, which decays to zero
            lr_warm_up_steps=config.steps // 20,
            lr_decay_steps=config.steps // 4,
            device=str(device),
            autocast=config.bf16,
            # Steps without being active, after which a feature counts as dead.
            dead_feature_window=max(100, min(1000, config.steps // 30)),
        )
        for sae in saes.values():
            if device.type == "mps" and hasattr(sae, "topk_threshold"):  # in float64, which MPS does not have
                sae.topk_threshold = sae.topk_threshold.float()
        self._trainers: dict[int, SAETrainer[Any, Any]] = {
            layer: SAETrainer(settings, sae.to(device), iter(())) for layer, sae in saes.items()
        }
        for layer, trainer in self._trainers.items():
            trainer.activation_scaler.scaling_factor = scales[layer]
        self._stream, self._config, self._folder = stream, config, folder
        self._step = 0

    def run(self) -> None:
        """Trains to the end, from the last checkpoint if there is one."""
        config = self._config
        begun = checkpoints(self._folder)
        if begun:
            self._load(begun[-1])
        total = config.steps * config.batch_size
        tracker = self._tracker() if config.report_to == "wandb" else nullcontext()
        bar = tqdm(total=total, initial=self._step * config.batch_size, unit="token", unit_scale=True, desc="Training")
        with bar as progress, tracker as run:
            batches = iter(self._stream)
            while self._step < config.steps:
                batch = next(batches)
                is_logged = self._step % _LOGGED == 0 or self._step == config.steps - 1
                logged: dict[str, Any] = {}
                for layer, trainer in self._trainers.items():
                    trainer.maybe_reset_sparsity()
                    output = trainer.step(batch[layer])
                    if is_logged:
                        found = trainer.build_train_step_log_dict(output, trainer.n_training_samples)
                        logged |= {f"layer_{layer}/{name}": value for name, value in found.items()}
                    trainer.n_training_steps += 1
                self._step += 1
                progress.update(config.batch_size)
                if is_logged:
                    progress.set_postfix_str(self._summary(logged), refresh=False)
                    if run is not None:
                        run.log(logged, step=self._step)
                if config.save_steps and (self._step % config.save_steps == 0 or self._step == config.steps):
                    self._save()
        for trainer in self._trainers.values():
            trainer.set_final_sae_metadata()

    def _summary(self, logged: Mapping[str, Any]) -> str:
        """What the progress bar says of each layer."""
        return "; ".join(
            f"layer {layer}: explained {logged[f'layer_{layer}/metrics/explained_variance']:.3f}, "
            f"L0 {logged[f'layer_{layer}/metrics/l0']:.1f}, "
            f"dead {logged[f'layer_{layer}/sparsity/dead_features'] / trainer.sae.cfg.d_sae:.1%}"
            for layer, trainer in self._trainers.items()
        )

    def _tracker(self) -> Any:
        import wandb

        # The same run again if training goes on in this folder.
        run = f"{self._folder.resolve()} {(self._folder / 'run.json').read_text(encoding='utf-8')}"
        name = hashlib.sha256(run.encode()).hexdigest()[:16]
        return wandb.init(config=vars(self._config), id=name, resume="allow", dir=str(self._folder))

    def _save(self) -> None:
        """Writes a checkpoint, and then removes those before it."""
        before, folder = checkpoints(self._folder), self._folder / f"checkpoint-{self._step}"
        partial = partial_of(folder)
        for layer, trainer in self._trainers.items():
            trainer.save_checkpoint(f"layer_{layer}", partial)
        state = {"step": self._step, **self._stream.state_dict()}
        (partial / _STREAM).write_text(json.dumps(state), encoding="utf-8")
        partial.rename(folder)
        for checkpoint in before:
            shutil.rmtree(checkpoint)

    def _load(self, checkpoint: Path) -> None:
        for layer, trainer in self._trainers.items():
            trainer.load_trainer_state(checkpoint / f"layer_{layer}")
            trainer.sae.load_weights_from_checkpoint(checkpoint / f"layer_{layer}")
        state = json.loads((checkpoint / _STREAM).read_text(encoding="utf-8"))
        self._step = state["step"]
        self._stream.load_state_dict(state)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run that are complete, from the first to the last."""
    found = {int(match[1]): path for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))}
    return [found[step] for step in sorted(found)]
