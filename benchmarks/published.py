"""The baseline of the benchmarks: a plain version of the published training and steering on sae-lens modules."""

from __future__ import annotations

import csv
import json
import platform
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from yapo_peft import YaPOTrainingConfig


class Published:
    """Trains a code as in arXiv 2601.08441: both passes run the whole model and the whole autoencoder.

    A step runs the steered model and the reference (the same model at multiplier 0) on the chosen and rejected rows
    with their prompts, and computes all logits and log-probabilities. The code is kept in float32, as in ours.

    Args:
        model: A causal language model without adapters. Its parameters are frozen.
        layer: Index of the layer to steer.
        sae: Folder of a sae-lens SAE.
        learning_rate: Learning rate of AdamW.
    """

    def __init__(self, model: Any, layer: int, sae: str, learning_rate: float = 2e-2) -> None:
        from sae_lens import SAE

        self.model, self.sae = model.requires_grad_(False), SAE.load_from_disk(sae).float()
        self.code = nn.Parameter(torch.zeros(self.sae.cfg.d_sae))
        self.multiplier: float | None = None
        self.seconds: dict[str, float] = {}
        self.optimizer = torch.optim.AdamW([self.code], lr=learning_rate, weight_decay=0.0)
        model.model.layers[layer].register_forward_hook(self._steer)

    def _steer(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if self.multiplier is None:
            return output
        hidden = output.detach()
        with torch.no_grad():
            features = self.sae.encode(hidden)
            error = hidden - self.sae.decode(features)
            if self.sae.cfg.normalize_activations == "layer_norm":
                self.sae.encode(hidden)  # decode() consumes the normalisation statistics
        return self.sae.decode(torch.relu(features + self.multiplier * self.code)) + error

    def step(self, batch: dict[str, Tensor], direction: float, beta: float = 0.1) -> float:
        """Trains on a collated batch of pairs and returns the loss; adds the time of each phase to `seconds`."""
        with self._timed("steered pass"):
            chosen, rejected = self._log_probs(batch, direction)
        with self._timed("reference pass"), torch.no_grad():
            ref_chosen, ref_rejected = self._log_probs(batch, 0.0)
        margin = (chosen - ref_chosen) - (rejected - ref_rejected)
        loss = -nn.functional.logsigmoid(direction * beta * margin).mean()
        with self._timed("backward"):
            loss.backward()
        with self._timed("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        return float(loss.detach())

    def _log_probs(self, batch: dict[str, Tensor], multiplier: float) -> tuple[Tensor, Tensor]:
        self.multiplier = multiplier
        try:
            logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        finally:
            self.multiplier = None
        tokens = logits.float().log_softmax(dim=-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
        chosen, rejected = (tokens * batch["completion_mask"][:, 1:]).sum(dim=1).chunk(2)
        return chosen, rejected

    @contextmanager
    def _timed(self, phase: str) -> Generator[None]:
        started = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started


def cached_arguments(folder: Path, cache: str, **options: Any) -> YaPOTrainingConfig:
    """Training arguments of ours, the published ones unless given, with activations cached in the subfolder `cache`."""
    return YaPOTrainingConfig.published(
        output_dir=str(folder / "out"),
        cache_activations=True,
        activation_cache_dir=str(folder / cache),
        save_strategy="no",
        report_to="none",
        logging_steps=10,
        disable_tqdm=True,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        **options,
    )


def pairs_of(file: Path | None, split: str = "train") -> Dataset:
    """Preference pairs from a CSV file with the columns question, matching and not_matching, or the embedded ones."""
    if file is None:
        from embedded import preferences

        return preferences("enthusiasm", split)
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    names = {
        "prompt": ("user", "question"),
        "chosen": ("assistant", "matching"),
        "rejected": ("assistant", "not_matching"),
    }
    return Dataset.from_list(
        [{name: [{"role": role, "content": row[key]}] for name, (role, key) in names.items()} for row in rows]
    )


@torch.no_grad()
def random_sae(d_sae: int, hidden: Tensor, active: int, folder: Path) -> str:
    """Saves a JumpReLU SAE with random weights and about `active` active features per token, and returns its folder.

    The SAE normalises its input. Otherwise tokens with an extreme norm would activate half of the random features.

    Args:
        d_sae: Number of features.
        hidden: Activations of the model, `(tokens, d_model)`, to choose the threshold on.
        active: Number of active features per token.
        folder: Folder to save the SAE to.
    """
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    width = hidden.shape[-1]
    generator = torch.Generator().manual_seed(0)
    sae = JumpReLUSAE(
        JumpReLUSAEConfig(d_in=width, d_sae=d_sae, normalize_activations="layer_norm", apply_b_dec_to_input=False)
    )
    directions = torch.randn(d_sae, width, generator=generator)
    sae.W_dec.data = directions / directions.norm(dim=1, keepdim=True)
    sae.W_enc.data = sae.W_dec.data.T.contiguous()
    sae.b_enc.data.zero_()
    sae.b_dec.data.zero_()
    inputs = hidden - hidden.mean(dim=-1, keepdim=True)
    inputs = inputs / (inputs.std(dim=-1, keepdim=True) + 1e-5)
    sample = inputs[:: max(1, len(inputs) // 64)] @ sae.W_enc
    sae.threshold.data.fill_(float(sample.topk(active, dim=-1).values[:, -1].median()))
    sae.save_model(folder)
    return str(folder)


def machine() -> dict[str, Any]:
    """The machine that the results were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}


def report(results: dict[str, Any], out: Path | None) -> None:
    """Prints results as JSON, and writes them to a file if one is given."""
    text = json.dumps({**results, "machine": machine()}, indent=2)
    print(text)
    if out is not None:
        out.write_text(text + "\n")
