"""Chooses the layer, the SAE and the number of features by short trainings, compared at equal damage."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .._utils import at_least, begin_or_resume, evaluating, hash_model, listed, replacing
from ..errors import ConfigError, DatasetError
from ..sae import load_sae
from ..scoring.calibration import calibrate, require_bound
from ..trainer import YaPOTrainer, YaPOTrainingConfig
from ..tuner import YaPOConfig
from ..tuner.adapters import steered_layers
from .scores import Scores, interval, resampled_means
from .sweep import sweep

# Options of the training that are not the caller's.
_OURS = {"output_dir", "max_steps", "max_kl", "max_features", "cache_activations", "activation_cache_dir"}
# Shares of a full training in both rounds, and the share of the candidates that is trained again.
_FIRST, _SECOND, _AGAIN = 1 / 8, 1 / 2, 1 / 4
_RESAMPLES = 2000


@dataclass(frozen=True)
class Candidate:
    """A layer, an SAE and a number of features to try.

    Attributes:
        config: The config of an adapter without a code.
        max_features: As in `YaPOTrainingConfig`.
    """

    config: YaPOConfig
    max_features: int | None = None

    @property
    def name(self) -> str:
        """A name that says what it is, such as "layer 14, my-sae, 64 features"."""
        config, saes = self.config, "dense"
        if config.space == "sae":
            found = config.sae_id or [Path(path).name for path in listed(config.sae_path)] or ["sae"]
            saes = " + ".join(listed(found))
        layers = ", ".join(map(str, listed(config.layers)))
        features = "" if self.max_features is None else f", {self.max_features} features"
        positions = "" if config.positions == "all" else f", positions={config.positions!r}"
        return f"layer {layers}, {saes}{features}{positions}"

    def identity(self) -> dict[str, Any]:
        """What tells it from others: its options, and the hash of each SAE that is a folder or an object."""
        hashes = [load_sae(path=path).identity.content_hash for path in listed(self.config.sae_path)]
        hashes = hashes or [sae.get("content_hash") for sae in self.config.sae_identity or []]
        return self.options() | {"saes": hashes}

    def options(self) -> dict[str, Any]:
        """What `yapo train` needs to train it, as fields of its YAML config."""
        named = ("layers", "space", "sae_release", "sae_id", "sae_path", "positions", "blocks")
        values = {name: getattr(self.config, name) for name in named} | {"max_features": self.max_features}
        # `yapo train` takes lists.
        as_lists = ("layers", "sae_release", "sae_id", "sae_path")
        return {n: listed(v) if n in as_lists else v for n, v in values.items() if v is not None}


@dataclass(frozen=True)
class Choice:
    """The result of `choose`.

    Attributes:
        best: The best candidate.
        table: A row per candidate, the best first: `candidate`; `gain`, the mean of both directions, and `up` and
            `down`, how far the margin moves at multipliers +1 and -1, in nats, with bounds of their 95 % bootstrap
            intervals; `features`, the number of entries of its code that are not zero; `kl_plus` and `kl_minus`, its
            damage; `steps`, of the training that this was measured after.
        lead: How far `gain` of the best is above that of the next one: mean, and bounds of the paired interval.
    """

    best: Candidate
    table: pd.DataFrame
    lead: tuple[float, float, float]


def choose(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    candidates: Sequence[Candidate],
    pairs: Dataset,
    held_out: Dataset,
    folder: str | Path,
    *,
    max_kl: float = 0.1,
    steps: int | None = None,
    batch_size: int = 8,
    **training: Any,
) -> Choice:
    """Trains candidates for a short while, and compares what they gain at the same damage.

    Successive halving: all candidates train for an eighth of the steps, then the best quarter of them, at least two,
    again from the start for half of the steps. Together, eight candidates take as many steps as two full trainings.

    Args:
        model: The model, without adapters; what it computes is left as it was, its parameters are frozen.
        tokenizer: Its tokenizer.
        candidates: What to compare, at least two.
        pairs: Pairs to train on.
        held_out: Other pairs, to measure gains on.
        folder: Where results are kept: a call that was interrupted goes on there, given the same arguments.
        max_kl: The damage that all are trained for and scaled to, as in `calibrate`.
        steps: Steps of a full training, at least 8; those of three passes over `pairs` if None.
        batch_size: Rows per forward pass of measurements.
        **training: Other options of `YaPOTrainingConfig`, the same for all.

    Raises:
        ConfigError: There are fewer than two candidates, two have the same name, the model has adapters, an argument is
            invalid, `folder` has results of other arguments, or a candidate cannot be scaled to `max_kl`.
        DatasetError: `pairs` or `held_out` is empty.
    """
    names = [candidate.name for candidate in candidates]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ConfigError(f"candidates={names}: at least two are needed, whose names differ (rename folders of SAEs).")
    if isinstance(model, PeftModel) or steered_layers(model):
        raise ConfigError("The model has adapters: pass it without them.")
    if not len(pairs) or not len(held_out):
        raise DatasetError(f"{len(pairs)} pairs to train on and {len(held_out)} held out: both are needed.")
    dense = [each.name for each in candidates if each.config.space == "dense" and each.max_features is not None]
    if dense:
        raise ConfigError(f"{dense[0]}: max_features= is for sparse adapters.")
    require_bound(max_kl)
    at_least(1, batch_size=batch_size)
    taken = sorted(_OURS & set(training))
    if taken:
        raise ConfigError(f"{taken[0]}={training[taken[0]]!r}: choose sets it; leave it out.")
    full = _full_steps(len(pairs), training) if steps is None else steps
    at_least(8, steps=full)
    bench = _Bench(model, tokenizer, pairs, held_out, Path(folder), max_kl, batch_size, training)
    bench.begin([candidate.identity() for candidate in candidates], full)
    again = max(2, math.ceil(len(candidates) * _AGAIN))
    with tqdm(total=len(candidates) + again, desc="Candidates", unit="training") as bar:
        first = bench.round(candidates, max(2, round(full * _FIRST)), bar)
        second = bench.round([found.candidate for found in first[:again]], round(full * _SECOND), bar)
    shutil.rmtree(bench.activations, ignore_errors=True)
    best, following = second[0], second[1]
    table = pd.DataFrame([found.row() for found in (*second, *first[again:])])
    lead = (best.both - following.both).to_numpy()
    bounds = interval(resampled_means(lead[None], _RESAMPLES, seed=0), 0.95)
    return Choice(best.candidate, table, (float(lead.mean()), *bounds))


def _full_steps(pairs: int, training: dict[str, Any]) -> int:
    """Steps of a full training."""
    defaults = YaPOTrainingConfig
    rows = training.get("per_device_train_batch_size", defaults.per_device_train_batch_size)
    rows *= training.get("gradient_accumulation_steps", 1)
    return max(8, math.ceil(training.get("num_train_epochs", defaults.num_train_epochs) * pairs / rows))


@dataclass(frozen=True)
class _Found:
    """What a candidate gained.

    Attributes:
        candidate: The candidate.
        gains: The gains of each pair.
        facts: Other columns of the table.
    """

    candidate: Candidate
    gains: Scores
    facts: dict[str, float]

    @property
    def both(self) -> pd.Series:
        """The mean of both directions, by example."""
        table: Any = self.gains.table.set_index("example")
        up, down = (table[table["multiplier"] == multiplier]["gain"] for multiplier in (1, -1))
        return cast(pd.Series, (up - down) / 2)

    def row(self) -> dict[str, Any]:
        """Its row of the table."""
        found: dict[str, Any] = {"candidate": self.candidate.name, "gain": float(self.both.mean())}
        summary = self.gains.summary().set_index("multiplier")
        for direction, multiplier in (("up", 1.0), ("down", -1.0)):
            for column in ("", "_low", "_high"):
                found[direction + column] = float(cast(Any, summary.loc[multiplier, f"gain{column}"]))
        return found | self.facts


@dataclass(frozen=True)
class _Bench:
    """What all candidates share."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    pairs: Dataset
    held_out: Dataset
    folder: Path
    max_kl: float
    batch_size: int
    training: dict[str, Any]

    @property
    def activations(self) -> Path:
        """Where activations are cached."""
        return self.folder / "activations"

    def begin(self, candidates: list[dict[str, Any]], steps: int) -> None:
        """Records what is measured in the folder. Raises `ConfigError` if it has results of other arguments."""
        data = json.dumps([self.pairs.to_list(), self.held_out.to_list()], default=repr)
        arguments: dict[str, Any] = {f"candidate {place}": each for place, each in enumerate(candidates, 1)}
        arguments |= {"steps": steps, "max_kl": self.max_kl}
        arguments |= {name: repr(value) for name, value in self.training.items()}
        arguments["data"] = hashlib.sha256(data.encode()).hexdigest()
        begin_or_resume(self.folder / "run.json", arguments | {"model": hash_model(self.model, sampled=True)})

    def round(self, candidates: Sequence[Candidate], steps: int, bar: Any) -> list[_Found]:
        """Trains and measures candidates; the best first."""
        found: list[_Found] = []
        for candidate in candidates:
            bar.set_postfix_str(f"{candidate.name}, {steps} steps")
            found.append(self.measured(candidate, steps))
            bar.update()
        return sorted(found, key=lambda each: -each.both.mean())

    def measured(self, candidate: Candidate, steps: int) -> _Found:
        """The gains of a candidate after some steps; read from the folder if they are there."""
        digest = hashlib.sha256(candidate.name.encode()).hexdigest()[:16]
        scores, facts = (self.folder / f"{digest}-{steps}{end}" for end in ("-gains.json", "-facts.json"))
        if not facts.is_file():
            model: Any = get_peft_model(self.model, copy.deepcopy(candidate.config))
            try:
                with evaluating(model):
                    self._train(model, candidate, steps)
                damage = calibrate(model, self.tokenizer, self.max_kl)
                found = sweep(model, self.held_out, self.tokenizer, (-1.0, 0.0, 1.0), batch_size=self.batch_size)
                entries = sum(int(layer.code("default").count_nonzero()) for layer in steered_layers(model))
            except ConfigError as error:
                raise ConfigError(f"{candidate.name}: {error}") from error
            finally:
                model.unload()
            found.gains("margin").save(scores)
            kl = {f"kl_{side}": value for side, value in damage.items()}
            with replacing(facts) as partial:
                partial.write_text(json.dumps({"features": entries, **kl, "steps": steps}))
        return _Found(candidate, Scores.load(scores), json.loads(facts.read_text()))

    def _train(self, model: Any, candidate: Candidate, steps: int) -> None:
        defaults: dict[str, Any] = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
        defaults["dataloader_pin_memory"] = torch.accelerator.is_available()
        with tempfile.TemporaryDirectory() as out:
            args = YaPOTrainingConfig(
                output_dir=out,
                max_steps=steps,
                max_kl=self.max_kl,
                max_features=candidate.max_features,
                cache_activations=True,
                activation_cache_dir=str(self.activations),
                **(defaults | self.training),
            )
            with redirect_stdout(StringIO()):  # one bar for all
                trainer = YaPOTrainer(model, args, train_dataset=self.pairs, processing_class=self.tokenizer)
                trainer.train()
