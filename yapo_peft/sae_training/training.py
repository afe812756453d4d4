"""Trains SAEs on the outputs of several layers in one pass over the text, with sae-lens' trainer."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .._utils import begin_or_resume, device_of, hash_model, hash_tensors, listed, partial_of, replacing
from ..errors import ConfigError
from ..sae.loader import read_sae
from ..scoring.checks import context_length
from ..tuner.blocks import base_of, decoder_blocks, hidden_size, resolve_layers
from .activations import Activations, ActivationStream
from .config import SAETrainingConfig
from .measures import hub_name, measures_of, save_page
from .rows import held_out_rows, rows_of
from .saes import continued_sae, new_sae, require_possible, save_sae, with_defaults

if TYPE_CHECKING:
    from sae_lens import SAE, TrainingSAE
    from sae_lens.training.sae_trainer import SAETrainer

_MEASURES, _STREAM, _CHECKPOINT = "measures.json", "stream.json", re.compile(r"checkpoint-(\d+)")
# Steps between the numbers of the progress bar and of the tracker.
_LOGGED = 20
# Settings that may change when training goes on.
_FREE = ("store", "report_to", "save_steps", "forward_batch_size")


def train_saes(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[Any],
    config: SAETrainingConfig,
    output_dir: str | Path,
    *,
    held_out: Iterable[Any] | None = None,
    start: Mapping[int, SAE[Any]] | None = None,
) -> dict[int, dict[str, float]]:
    """Trains an SAE on the output of each of some layers of a model, and measures it on held-out text.

    Activations are computed as they are needed, unless `config.store` is set. The first token of each sequence, special
    tokens, and tokens that are attention sinks in one of the layers (more than ten times the median norm) are left out.

    `output_dir` gets a folder for each layer, such as `layer_14`, which `YaPOConfig(sae_path=...)` takes, with its
    measures in `measures.json`; and a `README.md` with all of them, which is the card if the folder is pushed to the
    Hub. A call that was interrupted continues at its last checkpoint if it is repeated.

    Args:
        model: A transformers causal language model.
        tokenizer: The model's tokenizer.
        texts: Texts, conversations, or rows with a column `text`, `messages`, or `prompt` and an answer, which are
            read until there are `config.tokens`. Conversations are rendered by the tokenizer's chat template.
        config: The settings.
        output_dir: Folder to save to.
        held_out: Texts to measure on. Default: `config.eval_split` of `texts`.
        start: SAEs of sae-lens to continue with instead of random weights, by layer: JumpReLU, standard or TopK. Their
            features keep their numbers.

    Returns:
        What `measure_sae` returns, by layer.

    Raises:
        ConfigError: A layer is out of range, an SAE to start from does not fit, or `output_dir` has the SAEs of another
            call.
        DatasetError: There is too little text.
        UnsupportedSAEError: An SAE to start from cannot be trained on.
    """
    base, folder = base_of(model), Path(output_dir)
    all_blocks = decoder_blocks(base)[1]
    layers = resolve_layers(sorted(listed(config.layers)), len(all_blocks))
    start = {resolve_layers([layer], len(all_blocks))[0]: sae for layer, sae in (start or {}).items()}
    if start and set(start) != set(layers):
        raise ConfigError(f"start has SAEs for layers {sorted(start)}: must be those of layers={layers}.")
    width = hidden_size(base)
    for layer in layers:
        require_possible(start.get(layer), width, config)
    context = min(config.context, context_length(base) or config.context)
    config = replace(config, layers=layers, context=context)
    if not start:
        config = with_defaults(config, width)
    if held_out is None:
        train, others = held_out_rows(texts, tokenizer, context, config.eval_split, config.tokens)
    else:
        train = rows_of(texts, tokenizer, context, config.tokens)
        others = rows_of(held_out, tokenizer, context)
    blocks = {layer: all_blocks[layer] for layer in layers}
    text, evaluated = (Activations(base, blocks, rows, tokenizer, config) for rows in (train, others))
    name = hash_model(base, sampled=True)
    run = {"model": name, "text": hash_tensors("", [("train", torch.cat(train)), ("held out", torch.cat(others))])}
    run |= {f"start of layer {layer}": hash_tensors("", sae.state_dict().items()) for layer, sae in start.items()}
    begin_or_resume(folder / "run.json", {**run, **{k: v for k, v in asdict(config).items() if k not in _FREE}})
    if config.store is not None:
        for activations in (text, evaluated):
            activations.store(Path(config.store), name)
    statistics = text.statistics()

    def measured(sae: SAE[Any], layer: int) -> dict[str, float]:
        return measures_of(sae, model, layer, evaluated, statistics[layer].limit, config)

    before = {layer: measured(sae, layer) for layer, sae in start.items()}
    folders = {layer: folder / f"layer_{layer}" for layer in layers}
    if not all((each / _MEASURES).is_file() for each in folders.values()):
        saes = {
            layer: continued_sae(start[layer], before[layer]["l0"], statistics[layer], config)
            if start
            else new_sae(width, statistics[layer], config)
            for layer in layers
        }
        scales = {layer: found.scale for layer, found in statistics.items()}
        stream = ActivationStream(text, {layer: found.limit for layer, found in statistics.items()}, config)
        TrainingLoop(saes, scales, stream, config, folder, device_of(base)).run()
        for layer, sae in saes.items():
            sae.cfg.metadata.model_name = hub_name(base) or type(base).__name__
            sae.cfg.metadata.hook_name = f"blocks.{layer}.hook_resid_post"
            sae.cfg.metadata.context_size = context
            save_sae(sae, scales[layer], folders[layer], config)
            with replacing(folders[layer] / _MEASURES) as partial:
                found = measured(read_sae(path=str(folders[layer])), layer)
                partial.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    for checkpoint in checkpoints(folder):
        shutil.rmtree(checkpoint)
    measures = {layer: json.loads((each / _MEASURES).read_text(encoding="utf-8")) for layer, each in folders.items()}
    save_page(folder, hub_name(base), measures, before, config)
    return measures


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
        self._stream, self._config, self._folder, self._device = stream, config, folder, device
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
                    output = trainer.step(batch[layer].to(self._device))
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
    found = {int(match[1]): path for path in folder.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))}
    return [found[step] for step in sorted(found)]
