"""What a report says, measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .._utils import at_least, evaluating
from ..errors import ConfigError
from ..evaluation import Damage, MultipleChoice, Preference, Scores, sweep
from ..interpret import Attribution, attribute, contexts, explain
from ..interpret.checks import require_multiplier
from ..interpret.texts import base_of, content_of_row, require_texts, tokenizer_of
from ..scoring.generation import answer
from ..scoring.pairs import prompt_ids
from ..tuner import YaPOConfig, YaPOLayer, steering
from ..tuner.adapters import adapter_of
from ..tuner.multiplier import require_enabled

MULTIPLIERS = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)


@dataclass(frozen=True)
class ReportContents:
    """What a report says of an adapter.

    Attributes:
        title: Name of the adapter.
        facts: What it is, as pairs of a name and a value.
        preference: Margin and accuracy on the dataset over multipliers.
        damage: KL, perplexity and changed tokens on text over multipliers.
        knowledge: Accuracy on questions over multipliers, if there were any.
        history: The log of its training, if it was found.
        attribution: What each feature contributes to the margin, if it is not left out.
        features: As `explain` gives it.
        passages: As `contexts` gives them.
        answers: Rows of `prompt`, `multiplier` and `answer`.
        multiplier: The multiplier at which features are read.
    """

    title: str
    facts: list[tuple[str, str]]
    preference: Scores
    damage: Scores
    knowledge: Scores | None
    history: list[dict[str, Any]]
    attribution: Attribution | None
    features: pd.DataFrame
    passages: pd.DataFrame
    answers: list[dict[str, Any]]
    multiplier: float


def collect_report(
    model: nn.Module,
    dataset: Iterable[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    adapter_name: str | None = None,
    title: str | None = None,
    text: Sequence[Any] | None = None,
    questions: Any = None,
    history: Sequence[dict[str, Any]] | None = None,
    multipliers: Sequence[float] = MULTIPLIERS,
    multiplier: float = 1.0,
    top: int = 20,
    attributed: int = 16,
    steps: int = 8,
    prompts: int = 3,
    max_new_tokens: int = 60,
    labels: bool = True,
    batch_size: int = 8,
) -> ReportContents:
    """Measures what a report says. The model is not changed.

    Args:
        model: A `PeftModel` with a YaPO adapter.
        dataset: Preference pairs in TRL's format, of what the adapter is about; better not those it was trained on.
        tokenizer: The model's; found by the model's name if None.
        adapter_name: The adapter; the active one if None.
        title: What to call it; its name if None.
        text: Running text for damage and contexts, as texts or rows with a column `text`; the pairs' own if None.
        questions: Multiple choice as of `load_choices`, for a knowledge check; none if None.
        history: The log of its training, `trainer.state.log_history`.
        multipliers: The multipliers of the dose-response.
        multiplier: The multiplier at which features are read and attributed.
        top: How many features of each block to list, besides those that are left out one by one.
        attributed: How many features to leave out one by one; 0 leaves attribution out.
        steps: Multipliers that integrated gradients are averaged over.
        prompts: How many of the dataset's prompts to answer at -1, 0 and +1 times `multiplier`.
        max_new_tokens: Length of these answers.
        labels: Whether to ask Neuronpedia for labels.
        batch_size: Rows per forward pass.

    Raises:
        ConfigError: There is no such adapter, or an argument has a value that cannot work.
        DatasetError: The dataset is empty, or a pair lacks a column or an answer.
    """
    name, config, layers = adapter_of(model, adapter_name)
    require_enabled(model)
    require_multiplier(multiplier)
    at_least(1, top=top, steps=steps, max_new_tokens=max_new_tokens, batch_size=batch_size)
    at_least(0, attributed=attributed, prompts=prompts)
    if text is not None:
        require_texts(text)
    if len(set(multipliers)) < 2:
        raise ConfigError(f"multipliers={list(multipliers)}: a dose-response needs at least two multipliers.")
    tokenizer = tokenizer_of(model, tokenizer)
    pairs = list(dataset)
    Preference().batches(pairs, tokenizer, 1)  # so that a pair that cannot be read is an error before any work
    texts = list(pairs if text is None else text)
    preference = sweep(model, pairs, tokenizer, multipliers, adapter_name=name, batch_size=batch_size)
    running = [_running(row) for row in texts]
    damage = sweep(
        model,
        running,
        tokenizer,
        multipliers,
        measure=_blocks(running, tokenizer),
        adapter_name=name,
        batch_size=batch_size,
    )
    knowledge = None
    if questions is not None:
        measure = MultipleChoice("text", "characters")
        knowledge = sweep(
            model, questions, tokenizer, multipliers, measure=measure, adapter_name=name, batch_size=batch_size
        )
    found = None
    if attributed and any(bool(layer.code(name).any()) for layer in layers):
        found = attribute(
            model,
            pairs,
            tokenizer,
            adapter_name=name,
            multiplier=multiplier,
            top=attributed,
            steps=steps,
            batch_size=batch_size,
        )
    table = explain(
        model,
        name,
        tokenizer=tokenizer,
        multiplier=multiplier,
        top=top,
        features=None if found is None else _worth_listing(found.features, top) or None,
        texts=texts,
        labels=labels,
        batch_size=batch_size,
    )
    wanted: dict[int, list[int]] = {}
    for layer, feature in zip(table["layer"].tolist(), table["feature"].tolist(), strict=True):
        if not pd.isna(feature):
            wanted.setdefault(layer, []).append(feature)
    passages = pd.DataFrame()
    if wanted:
        passages = contexts(model, wanted, texts, tokenizer, adapter_name=name, top=3, window=10, batch_size=batch_size)
    return ReportContents(
        title or name,
        _facts(model, config, layers, name),
        preference,
        damage,
        knowledge,
        list(history or []),
        found,
        table,
        passages,
        _answers(model, pairs[:prompts], tokenizer, name, multiplier, max_new_tokens),
        multiplier,
    )


def training_history(folder: str | Path) -> list[dict[str, Any]]:
    """The log of a training whose trainer wrote to a folder, or to one around it; empty if there is none."""
    folder = Path(folder)
    files = [parent / "trainer_state.json" for parent in (folder, folder.parent)]
    files += sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda file: int(file.parent.name[11:]))[::-1]
    for file in files:
        if file.is_file():
            return cast(list[dict[str, Any]], json.loads(file.read_text(encoding="utf-8")).get("log_history", []))
    return []


def _worth_listing(features: pd.DataFrame, top: int) -> dict[int, list[int]]:
    """Of each block, the features of the longest reach, and those that were left out one by one."""
    features = features.dropna(subset="feature")
    longest = features.sort_values("reach", ascending=False, kind="stable").groupby("layer").head(top)
    listed = pd.concat([longest, features.dropna(subset="left_out")])
    found: dict[int, list[int]] = {}
    for layer, feature in dict.fromkeys(zip(listed["layer"].tolist(), listed["feature"].tolist(), strict=True)):
        found.setdefault(layer, []).append(feature)
    return found


def _running(row: Any) -> str:
    """A row as running text."""
    parts = row if isinstance(row, str) else content_of_row(row)
    return parts if isinstance(parts, str) else " ".join(str(message["content"]) for message in parts)


def _blocks(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Damage:
    """Blocks as long as the text allows, few enough for a report."""
    tokens = sum(len(tokenizer(text + "\n", add_special_tokens=False)["input_ids"]) for text in texts[:200])
    return Damage(block_size=max(2, min(256, tokens)), max_blocks=16)


def _answers(
    model: nn.Module,
    pairs: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    multiplier: float,
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    multipliers = [-multiplier, 0.0, multiplier]
    for pair in pairs:
        ids = prompt_ids(pair["prompt"], tokenizer)
        with evaluating(model), steering(model, torch.tensor(multipliers), name):
            answers = answer(model, tokenizer, [ids] * 3, max_new_tokens=max_new_tokens, do_sample=False)
        said = pair["prompt"] if isinstance(pair["prompt"], str) else pair["prompt"][-1]["content"]
        found += [
            {"prompt": said, "multiplier": used, "answer": text}
            for used, (text, _) in zip(multipliers, answers, strict=True)
        ]
    return found


def _facts(model: nn.Module, config: YaPOConfig, layers: list[YaPOLayer], name: str) -> list[tuple[str, str]]:
    base = getattr(base_of(model), "name_or_path", "") or config.base_model_name_or_path or "unknown"
    facts = [
        ("model", Path(base).name if Path(base).exists() else base),
        ("space", "features of an SAE" if config.space == "sae" else "residual stream"),
        ("blocks", ", ".join(str(layer.index) for layer in layers)),
        ("tokens", config.positions),
    ]
    for layer in layers:
        sae, code = layer.yapo_sae[name], layer.code(name).detach()
        if sae is None:
            facts.append((f"vector of block {layer.index}", f"{len(code)} entries of length {float(code.norm()):.3g}"))
            continue
        identity = sae.identity
        where = f"{identity.release}, {identity.sae_id}" if identity.release else f"hash {identity.content_hash[:12]}"
        facts.append((f"SAE of block {layer.index}", f"{where}: {identity.d_sae} features, {identity.architecture}"))
        raised, lowered = int((code > 0).sum()), int((code < 0).sum())
        facts.append((f"code of block {layer.index}", f"{raised} entries above zero, {lowered} below"))
    return facts
