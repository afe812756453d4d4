"""Measures the contents of a report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, cast

import pandas as pd
from torch import nn
from transformers import PreTrainedTokenizerBase

from .._utils import at_least
from ..evaluation import Damage, MultipleChoice, Preference, Repetition, Scores, sweep
from ..evaluation.plots import require_dose_response
from ..interpret import Attribution, attribute, contexts, explain
from ..interpret.checks import require_multiplier
from ..interpret.texts import content_of_row, require_texts, tokenizer_of
from ..scoring.pairs import text_of
from ..tuner import YaPOConfig, YaPOLayer
from ..tuner.adapters import adapter_of, require_enabled
from ..tuner.blocks import base_of

MULTIPLIERS = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)


@dataclass(frozen=True)
class ReportContents:
    """The contents of a report about an adapter.

    Attributes:
        title: Title of the report.
        facts: Properties of the adapter, as names and values.
        preference: Margin and accuracy on the dataset, by multiplier.
        damage: KL, perplexity and changed tokens on text, by multiplier.
        knowledge: Accuracy on questions, by multiplier; None without questions.
        history: The log of the training; empty if there is none.
        attribution: The contribution of each feature to the margin; None if skipped.
        features: The table of `explain`.
        passages: The table of `contexts`.
        answers: Rows with `prompt`, `multiplier` and `answer`.
        multiplier: The multiplier for features and attribution.
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
    dataset_name: str | None = None,
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
    """Measures the contents of a report. The model is not changed.

    Args:
        model: A `PeftModel` with a YaPO adapter.
        dataset: Preference pairs in TRL's format, preferably not those of the training.
        tokenizer: The model's tokenizer; loaded by the model's name if None.
        adapter_name: The adapter; the active one if None.
        title: Title of the report; the adapter's name if None.
        dataset_name: Name of the dataset, to be shown with the number of pairs.
        text: Running text for damage and contexts, as texts or rows with a column `text`; the pairs if None.
        questions: Multiple-choice questions of `load_choices`, for a knowledge check.
        history: The log of the training, `trainer.state.log_history`.
        multipliers: The multipliers of the dose-response.
        multiplier: The multiplier for features and attribution.
        top: Number of features to list per layer, besides those that are ablated one by one.
        attributed: Number of features to ablate one by one; 0 skips attribution.
        steps: Number of multipliers that integrated gradients are averaged over.
        prompts: Number of prompts to answer at -1, 0 and +1 times `multiplier`.
        max_new_tokens: Maximum length of these answers, in tokens.
        labels: Whether to fetch labels from Neuronpedia.
        batch_size: Rows per forward pass.

    Raises:
        ConfigError: There is no such adapter, or an argument is invalid.
        DatasetError: The dataset is empty, or a pair lacks a column or an answer.
    """
    name, config, layers = adapter_of(model, adapter_name)
    require_enabled(model)
    require_multiplier(multiplier)
    at_least(1, top=top, steps=steps, max_new_tokens=max_new_tokens, batch_size=batch_size)
    at_least(0, attributed=attributed, prompts=prompts)
    if text is not None:
        require_texts(text)
    require_dose_response(multipliers)
    tokenizer = tokenizer_of(model, tokenizer)
    pairs = list(dataset)
    Preference().batches(pairs, tokenizer, 1)  # validates the pairs before any work
    texts = list(pairs if text is None else text)
    shared: dict[str, Any] = {"tokenizer": tokenizer, "adapter_name": name, "batch_size": batch_size}
    swept = partial(sweep, model, multipliers=multipliers, **shared)
    running = [_running(row) for row in texts]
    preference, damage = swept(pairs), swept(running, measure=_blocks(running, tokenizer))
    knowledge = None if questions is None else swept(questions, measure=MultipleChoice("text", "characters"))
    found = None
    if attributed and any(bool(layer.code(name).any()) for layer in layers):
        found = attribute(model, pairs, multiplier=multiplier, top=attributed, steps=steps, **shared)
    table = explain(
        model,
        multiplier=multiplier,
        top=top,
        features=None if found is None else _worth_listing(found.features, top) or None,
        texts=texts,
        labels=labels,
        **shared,
    )
    wanted = _by_layer(table)
    passages = contexts(model, wanted, texts, top=3, window=10, **shared) if wanted else pd.DataFrame()
    return ReportContents(
        title or name,
        [
            *_facts(model, config, layers, name),
            ("pairs", f"{len(pairs)} of {dataset_name}" if dataset_name else str(len(pairs))),
            ("date", date.today().isoformat()),
        ],
        preference,
        damage,
        knowledge,
        list(history or []),
        found,
        table,
        passages,
        _answers(model, pairs[:prompts], multiplier, max_new_tokens=max_new_tokens, **shared),
        multiplier,
    )


def training_history(folder: str | Path) -> list[dict[str, Any]]:
    """The log that a trainer wrote to a folder or its parent; empty if there is none."""
    folder = Path(folder)
    files = [parent / "trainer_state.json" for parent in (folder, folder.parent)]
    files += sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda file: int(file.parent.name[11:]))[::-1]
    for file in files:
        if file.is_file():
            return cast(list[dict[str, Any]], json.loads(file.read_text(encoding="utf-8")).get("log_history", []))
    return []


def _worth_listing(features: pd.DataFrame, top: int) -> dict[int, list[int]]:
    """The features of the largest reach at each layer, and those that were ablated one by one."""
    features = features.dropna(subset="feature")
    longest = features.sort_values("reach", ascending=False, kind="stable").groupby("layer").head(top)
    return _by_layer(pd.concat([longest, features.dropna(subset="left_out")]))


def _by_layer(table: pd.DataFrame) -> dict[int, list[int]]:
    features = table.dropna(subset="feature").drop_duplicates(["layer", "feature"]).groupby("layer", sort=False)
    return {int(cast(Any, layer)): found.tolist() for layer, found in features["feature"]}


def _running(row: Any) -> str:
    """The running text of a row."""
    parts = row if isinstance(row, str) else content_of_row(row)
    return parts if isinstance(parts, str) else " ".join(map(text_of, parts))


def _blocks(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Damage:
    """A measure with blocks as long as the text allows, and few enough for a report."""
    tokens = sum(len(tokenizer(text + "\n", add_special_tokens=False)["input_ids"]) for text in texts[:200])
    return Damage(block_size=max(2, min(256, tokens)), max_blocks=16)


def _answers(model: nn.Module, pairs: list[dict[str, Any]], multiplier: float, **options: Any) -> list[dict[str, Any]]:
    """The answers to each prompt at -1, 0 and +1 times the multiplier."""
    if not pairs:
        return []
    scores = sweep(model, pairs, multipliers=(-multiplier, 0.0, multiplier), measure=Repetition(), **options)
    table = scores.table.sort_values("example", kind="stable")
    prompts = [pairs[example]["prompt"] for example in table["example"]]
    said = [prompt if isinstance(prompt, str) else text_of(prompt[-1]) for prompt in prompts]
    return cast(Any, table.assign(prompt=said)[["prompt", "multiplier", "answer"]]).to_dict("records")


def _facts(model: nn.Module, config: YaPOConfig, layers: list[YaPOLayer], name: str) -> list[tuple[str, str]]:
    base = getattr(base_of(model), "name_or_path", "") or config.base_model_name_or_path or "unknown"
    facts = [
        ("model", Path(base).name if Path(base).exists() else base),
        ("space", "features of an SAE" if config.space == "sae" else "residual stream"),
        ("layers", ", ".join(str(layer.index) for layer in layers)),
        ("tokens", config.positions),
    ]
    for layer in layers:
        sae, code = layer.yapo_sae[name], layer.code(name).detach()
        if sae is None:
            facts.append((f"vector of layer {layer.index}", f"{len(code)} entries, norm {float(code.norm()):.3g}"))
            continue
        identity = sae.identity
        where = f"{identity.release}, {identity.sae_id}" if identity.release else f"hash {identity.content_hash[:12]}"
        facts.append((f"SAE of layer {layer.index}", f"{where}: {identity.d_sae} features, {identity.architecture}"))
        raised, lowered = int((code > 0).sum()), int((code < 0).sum())
        said = "{} features held above 0, {} at 0" if layer.clamps[name] else "{} positive entries, {} negative"
        facts.append((f"code of layer {layer.index}", said.format(raised, lowered)))
    return facts
