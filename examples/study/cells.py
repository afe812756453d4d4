"""One cell of the study: an adapter of one method, for one behaviour, with one seed; and what is measured of it."""

from __future__ import annotations

import json
import math
import os
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from embedded import load_model_and_tokenizer, sae_folder, sae_layer
from peft import PeftModel, get_peft_model
from sources import Behaviour, load_texts

from yapo_peft import YaPOConfig, YaPOTrainer, YaPOTrainingConfig, calibrate, sweep
from yapo_peft._utils import replacing
from yapo_peft.data import with_system_prompt
from yapo_peft.evaluation import Damage, MultipleChoice, Scores
from yapo_peft.methods import fit_caa, fit_random, fit_sas, measure_contrast, prune
from yapo_peft.scoring.neutral import packaged_text

# Rows of neutral text that adapters are calibrated on.
_CALIBRATION_ROWS = 32


@dataclass(frozen=True)
class Method:
    """A way to steer, with its settings: fitted, trained, or a system prompt.

    Attributes:
        space: "sae" or "dense"; None for a system prompt.
        fit: "caa", "sas", "random" or "prune"; None if it is trained.
        of: The method whose adapter is pruned, or whose settings are used.
        features: How many features pruning keeps.
        published: Whether to train with the paper's hyper-parameters, where none are given.
    """

    name: str
    space: str | None = None
    fit: str | None = None
    of: str | None = None
    features: int | None = None
    tau: float | None = None
    published: bool = False
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def is_trained(self) -> bool:
        """Whether it is neither fitted nor a prompt."""
        return self.space is not None and self.fit is None

    @property
    def is_random(self) -> bool:
        """Whether another seed gives something else."""
        return self.is_trained or self.fit in ("random", "prune")

    @property
    def setting(self) -> str:
        """What its candidates differ in, as the name of a folder."""
        if self.tau is not None:
            return f"tau-{self.tau}"
        return f"rate-{self.training['learning_rate']}" if "learning_rate" in self.training else "fixed"


def candidates(name: str, entry: dict[str, Any]) -> list[Method]:
    """A method of the config with each of the settings that it lists."""
    entry = {key: value for key, value in entry.items() if key != "prompt"}
    plain = Method(name, **entry)
    if isinstance(plain.tau, list):
        return [replace(plain, tau=tau) for tau in plain.tau]
    rates = plain.training.get("learning_rate")
    others = [key for key, value in plain.training.items() if isinstance(value, list) and key != "learning_rate"]
    if others:
        raise SystemExit(f"{name}: {others[0]} has several values; only learning_rate and tau are tuned.")
    if isinstance(rates, list):
        return [replace(plain, training={**plain.training, "learning_rate": rate}) for rate in rates]
    return [plain]


class Bench:
    """The model, the data that all cells share, and where results are kept.

    Args:
        config: The study's.
        data: Folder of its files.
        out: Folder of its results.
    """

    def __init__(self, config: dict[str, Any], data: Path, out: Path) -> None:
        self.config, self.data, self.out = config, data, out
        self.neutral = packaged_text()[: config.get("neutral_rows")]
        self.device = torch.accelerator.current_accelerator() or torch.device("cpu")
        self._loaded: tuple[Any, Any] | None = None
        self._attached: Any = None

    def folder(self, behaviour: str, method: Method, seed: int) -> Path:
        """Where a cell is kept."""
        return self.out / _slug(behaviour) / _slug(method.name) / method.setting / f"seed-{seed}"

    def make(self, behaviour: Behaviour, method: Method, seed: int, like: Path | None = None) -> Path:
        """Fits or trains a cell's adapter, unless it is there, so that multiplier 1 does the config's damage.

        Args:
            behaviour: What to steer towards.
            method: How.
            seed: Of the order of the data and the directions.
            like: The cell of the method that it is made of.
        """
        folder = self.folder(behaviour.name, method, seed)
        if (folder / "adapter").is_dir() or method.space is None:
            return folder
        model, tokenizer = self.attached(method.space)
        log: list[dict[str, Any]] = []
        if method.is_trained:
            log = self._train(model, tokenizer, behaviour, method, seed)
        elif method.fit == "prune":
            model, _ = self.saved(like)
            prune(model, cast(int, method.features), rescale=True)
        elif method.fit == "random":
            model.load_adapter(str(like / "adapter"), "like")
            fit_random(model, "like", seed=seed)
            model.delete_adapter("like")
        else:
            contrast = measure_contrast(model, behaviour.train, tokenizer)
            if method.fit == "caa":
                fit_caa(model, contrast)
            else:
                fit_sas(model, contrast, tau=method.tau)
        calibrate(model, tokenizer, self.config["max_kl"], dataset=self.neutral[:_CALIBRATION_ROWS])
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "log.json", {"method": asdict(method), "log": log})
        # Beside the target and renamed, so that a run that stops leaves no half of an adapter.
        partial = folder / f"adapter.{os.getpid()}.partial"
        model.save_pretrained(partial)
        partial.rename(folder / "adapter")
        return folder

    def attached(self, space: str = "dense") -> tuple[Any, Any]:
        """The model with a new adapter, and the tokenizer."""
        base, tokenizer = self._base()
        self._attached = get_peft_model(base, YaPOConfig(**self._adapter(space))).to(self.device)
        return self._attached, tokenizer

    def saved(self, folder: Path) -> tuple[Any, Any]:
        """The model with a cell's adapter, and the tokenizer."""
        base, tokenizer = self._base()
        self._attached = PeftModel.from_pretrained(base, str(folder / "adapter")).to(self.device)
        return self._attached, tokenizer

    def _base(self) -> tuple[Any, Any]:
        """The model, without what was attached to it before."""
        name = self.config["model"]
        if self._loaded is None and name == "embedded":
            model, tokenizer = load_model_and_tokenizer()
            self._loaded = model.to(getattr(torch, self.config.get("dtype", "float32"))), tokenizer
        elif self._loaded is None:
            from transformers import AutoModelForCausalLM, AutoTokenizer

            model = AutoModelForCausalLM.from_pretrained(name["name"], dtype=name.get("dtype", "auto"))
            self._loaded = model, AutoTokenizer.from_pretrained(name["name"])
        if self._attached is not None:
            self._attached.unload()
        return self._loaded

    def _adapter(self, space: str) -> dict[str, Any]:
        name = self.config["model"]
        own = {"layers": sae_layer(), "sae_path": sae_folder()} if name == "embedded" else name["adapter"]
        if space == "dense":
            own = {"layers": own["layers"]}
        return {**own, "space": space, "task_type": "CAUSAL_LM"}

    def _train(
        self, model: Any, tokenizer: Any, behaviour: Behaviour, method: Method, seed: int
    ) -> list[dict[str, Any]]:
        options = {**self.config["training"], **method.training}
        steps, evaluations = options["max_steps"], options.pop("evaluations")
        make = YaPOTrainingConfig.published if method.published else YaPOTrainingConfig
        with tempfile.TemporaryDirectory() as folder:
            args = make(
                output_dir=folder,
                seed=seed,
                eval_strategy="steps",
                eval_steps=math.ceil(steps / evaluations),
                logging_steps=max(1, steps // 20),
                cache_activations=True,
                activation_cache_dir=str(self.out / "activations"),
                max_length=512,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
                **options,
            )
            data: dict[str, Any] = {"train_dataset": behaviour.train, "eval_dataset": behaviour.validation}
            if args.max_kl is not None:
                data["neutral_dataset"] = self.neutral
            trainer = YaPOTrainer(model, args, processing_class=tokenizer, **data)
            trainer.train()
        return trainer.state.log_history

    def score(self, behaviour: Behaviour, folder: Path) -> float:
        """The gain on validation pairs from multiplier -1 to +1, in nats."""
        model, tokenizer = self.saved(folder)
        margins = sweep(model, behaviour.validation, tokenizer, (-1.0, 1.0), batch_size=16).summary()["margin"]
        return float(margins[1] - margins[0])

    def effect(self, behaviour: Behaviour, folder: Path, method: Method) -> Scores:
        """Preference on the test pairs over all multipliers; of a prompt, with it, without, and with its opposite."""

        def base() -> Scores:
            model, tokenizer = self.attached()
            return sweep(model, behaviour.test, tokenizer, [0.0], batch_size=16)

        def measure() -> Scores:
            # Unsteered, all methods are the same model.
            parts = [kept(self.out / _slug(behaviour.name) / "base.json", base)]
            if method.space is not None:
                model, tokenizer = self.saved(folder)
                return Scores.concat([*parts, sweep(model, behaviour.test, tokenizer, self._steered, batch_size=16)])
            model, tokenizer = self.attached()
            for sign, prompt in behaviour.prompts.items():
                scores = sweep(model, with_system_prompt(behaviour.test, prompt), tokenizer, [0.0], batch_size=16)
                parts.append(_as_multiplier(float(sign), scores))
            return Scores.concat(parts)

        return kept(folder / "preference.json", measure)

    def harm(self, folder: Path, method: Method) -> Scores | None:
        """KL from the base on each kind of text over all multipliers; a prompt says nothing of that."""
        if method.space is None:
            return None

        def measure() -> Scores:
            model, tokenizer = self.saved(folder)
            parts = []
            for kind, entry in self.config["texts"].items():
                texts = load_texts(self.data, entry, tokenizer)
                measure = Damage(entry["block_size"], entry["blocks"])
                scores = sweep(model, texts, tokenizer, [0.0, *self._steered], measure=measure, batch_size=4)
                parts.append(scores.labelled(text=kind))
            return Scores.concat(parts)

        return kept(folder / "damage.json", measure)

    @property
    def _steered(self) -> list[float]:
        return [sign * float(size) for sign in (-1, 1) for size in self.config["multipliers"]]

    def choices(
        self, file: str, folder: Path, method: Method, questions: Any, chat: bool, base: Path, prompt: str
    ) -> Scores:
        """Multiple choice by the likelihood of the options' texts, per character; a prompt counts as multiplier 1.

        Args:
            file: Where in the cell's folder it is kept.
            folder: The cell's.
            method: Its method.
            questions: As of `load_choices`.
            chat: Whether they are a user's.
            base: Where the base model's answers are kept, which are the same for all cells.
            prompt: The system prompt, for that method.
        """

        def asked(model: Any, tokenizer: Any, multipliers: list[float], system: str | None = None) -> Scores:
            measure = MultipleChoice("text", "characters", chat=chat, system_prompt=system)
            return sweep(model, questions, tokenizer, multipliers, measure=measure, batch_size=16)

        def measure() -> Scores:
            unsteered = kept(base, lambda: asked(*self.attached(), [0.0]))
            if method.space is not None:
                return Scores.concat([unsteered, asked(*self.saved(folder), [-1.0, 1.0])])
            return Scores.concat([unsteered, _as_multiplier(1.0, asked(*self.attached(), [0.0], prompt))])

        return kept(folder / file, measure)


def _as_multiplier(multiplier: float, unsteered: Scores) -> Scores:
    """What was measured behind a system prompt, as if steering had done it."""
    return Scores(unsteered.table.assign(multiplier=multiplier), unsteered.metrics)


def kept(path: Path, measure: Any) -> Scores:
    """The scores of a file; measured, if there is none."""
    if not path.is_file():
        measure().save(path)
    return Scores.load(path)


def write_json(file: Path, content: Any) -> None:
    """Writes a file as a whole or not at all."""
    with replacing(file) as partial:
        partial.write_text(json.dumps(content, indent=1))


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower()).replace("--", "-").strip("-")
