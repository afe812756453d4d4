"""Trains SAEs on the outputs of several layers in one pass over the text, with sae-lens' trainer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .._utils import begin_or_resume, device_of, hash_model, hash_tensors, listed, replacing
from ..errors import ConfigError
from ..sae.loader import read_sae
from ..scoring.checks import context_length
from ..tuner.blocks import base_of, decoder_blocks, hidden_size, resolve_layers
from .activations import Activations, ActivationStream
from .config import SAETrainingConfig
from .loop import TrainingLoop, checkpoints
from .measures import measures_of
from .page import hub_name, save_page
from .rows import held_out_rows, rows_of
from .saes import continued_sae, new_sae, require_possible, save_sae

if TYPE_CHECKING:
    from sae_lens import SAE

_MEASURES = "measures.json"
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
