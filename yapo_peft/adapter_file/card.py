"""The model card of an adapter: what it steers, with which SAE, how it was trained, and how to use it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment, FileSystemLoader
from torch import nn

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..tuner import YaPOConfig

_LIBRARIES = ("yapo-peft", "peft", "transformers", "trl", "sae-lens", "torch")
_TAGS = {
    "sae": ("yapo", "steering", "activation-steering", "sparse-autoencoder"),
    "dense": ("yapo", "steering", "activation-steering"),
}
_ADAPTER_OF = "base_model:adapter:"
_FEATURES = 10
# The sections that describe one adapter. The first one ends with a digest of all, which shows edits by others.
_FACTS = "What it steers"
_OTHERS = ("Training", "Evaluation", "What it does", "Features")
_MARK = re.compile(r"\n*<!-- yapo_peft ([0-9a-f]{16}) -->\n*")
# What PEFT's own template leaves in the card of a folder that had none.
_UNFILLED = "[More Information Needed]"
_TEMPLATES = Environment(loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True)
# What a config says becomes one literal of the snippet, or one cell of a table.
_TEMPLATES.filters["literal"] = lambda text: json.dumps(text, ensure_ascii=False).replace("`", r"\u0060")
_TEMPLATES.filters["cell"] = lambda text: _cell(str(text))


def model_card(
    model: nn.Module,
    adapter_name: str | None = None,
    *,
    repo_id: str | None = None,
    dataset: str | None = None,
    metrics: Mapping[str, float] | None = None,
    training: Mapping[str, Any] | None = None,
    features: Any = None,
    plot: str | None = None,
    chat: bool = False,
) -> ModelCard:
    """Writes the card of an adapter.

    `save_pretrained` and the trainer save one by themselves. `model.push_to_hub` replaces it by transformers' generic
    card: push this one after it, with `model_card(model, repo_id=...).push_to_hub(repo_id)`.

    Args:
        model: A `PeftModel` with a YaPO adapter.
        adapter_name: Which adapter; None for the active one.
        repo_id: Where users will find it, as "owner/name".
        dataset: Name of the preference dataset that it was trained on.
        metrics: Its evaluation, by name.
        training: Settings of the training, by name.
        features: The table that `yapo_peft.interpret.explain` returned; its first rows are listed.
        plot: Name of an image beside the card, such as a dose-response plot.
        chat: Whether the snippet uses the tokenizer's chat template.

    Returns:
        The card, with `save` and `push_to_hub`.

    Raises:
        ConfigError: The model has no such adapter.
    """
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    active = getattr(model, "active_adapters", None)
    name = adapter_name or (active[0] if isinstance(active, list) and active else next(iter(configs), ""))
    config = configs.get(name)
    if getattr(config, "peft_type", None) != "YAPO":
        raise ConfigError(f"{type(model).__name__} has no YaPO adapter {name!r}.")
    config = cast("YaPOConfig", config)
    is_local = dataset is not None and Path(dataset).exists()
    if dataset or training:
        training = {"dataset": Path(dataset).name if dataset and is_local else dataset, **(training or {})}
    return _render(
        config,
        config.base_model_name_or_path or cast(str, getattr(model, "name_or_path", "")) or None,
        datasets=[dataset] if dataset is not None and not is_local else None,
        training={name: value for name, value in (training or {}).items() if value is not None},
        repo_id=repo_id,
        metrics=metrics,
        rows=_rows(features),
        plot=plot,
        chat=chat,
        tags=getattr(getattr(model, "base_model", model), "model_tags", None),
    )


def add_findings(card: ModelCard, *, features: Any = None, plot: str | None = None) -> ModelCard:
    """Returns a copy of a card with a table of features and a plot, in place of those that it had.

    Args:
        card: The card of an adapter.
        features: The table that `yapo_peft.interpret.explain` returned; its first rows are listed.
        plot: Name of an image beside the card.
    """
    card = ModelCard(card.content)
    is_signed = _is_signed(card.text)
    found = _TEMPLATES.get_template("findings.md.jinja").render(rows=_rows(features), plot=plot)
    for section in re.findall(r"^## .*?(?=^## |\Z)", found, re.MULTILINE | re.DOTALL):
        own = _section(section.split("\n", 1)[0].removeprefix("## "), card.text)
        last = re.search(r"^## Versions", card.text, re.MULTILINE)
        start = own.start() if own else last.start() if last else len(card.text)
        end = own.end() if own else start
        parts = (card.text[:start].rstrip(), section.strip(), card.text[end:].lstrip())
        card.text = "\n\n".join(parts).rstrip() + "\n"
    if is_signed:
        card.text = _signed(card.text)
    return card


def save_card(config: YaPOConfig, folder: Path) -> None:
    """Saves a card beside an adapter.

    A card that is there gets the method's tags. If it is one of ours, of other layers, SAEs or another damage, it also
    says what the adapter steers now, and no longer how others were trained and what they did. The user's words stay.
    """
    file = folder / "README.md"
    card = ModelCard.load(file) if file.exists() else None
    fresh = _render(config, config.base_model_name_or_path, tags=cast(Any, card).data.tags if card else None)
    if card is None or _UNFILLED in card.text:
        fresh.save(file)
        return
    data = cast(Any, card.data)
    own, new = (_section(_FACTS, text) for text in (card.text, fresh.text))
    if (
        own is not None
        and new is not None
        and _is_signed(card.text)
        and _MARK.sub("", own[0]).strip() != _MARK.sub("", new[0]).strip()
    ):
        card.text = card.text[: own.start()] + new[0] + card.text[own.end() :]
        for title in _OTHERS:
            stale = _section(title, card.text)
            if stale is not None:
                card.text = card.text[: stale.start()] + card.text[stale.end() :]
        card.text = _signed(card.text)
        data.tags = [tag for tag in data.tags or [] if tag not in _TAGS["sae"]]
    data.tags = sorted({*(data.tags or []), *_TAGS[config.space]})
    card.save(file)


def _section(title: str, text: str) -> re.Match[str] | None:
    """A section of a card, with its heading."""
    return re.search(rf"^## {re.escape(title)} *\n.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)


def _signed(text: str) -> str:
    """A card with the digest of our sections below its facts."""
    text = _MARK.sub("\n\n", text)
    own = _section(_FACTS, text)
    assert own is not None
    return f"{text[: own.end()].rstrip()}\n\n<!-- yapo_peft {_digest(text)} -->\n\n{text[own.end() :]}"


def _is_signed(text: str) -> bool:
    """Whether our sections of a card are as they were written."""
    found = _MARK.search(text)
    return found is not None and found[1] == _digest(text)


def _digest(text: str) -> str:
    sections = (_section(title, _MARK.sub("\n\n", text)) for title in (_FACTS, *_OTHERS))
    return hashlib.sha256("\n".join(own[0].strip() for own in sections if own).encode()).hexdigest()[:16]


def _render(
    config: YaPOConfig,
    base_model: str | None,
    datasets: list[str] | None = None,
    tags: list[str] | None = None,
    **given: Any,
) -> ModelCard:
    is_repository = base_model is not None and not Path(base_model).exists() and _is_repository(base_model)
    data = ModelCardData(
        library_name="peft",
        pipeline_tag="text-generation",
        base_model=base_model if is_repository else None,
        base_model_relation="adapter" if is_repository else None,
        datasets=datasets,
        # PEFT names the model in a tag even if it is a local folder.
        tags=sorted(
            {*_TAGS[config.space], "transformers"}
            | {tag for tag in tags or [] if not tag.startswith(_ADAPTER_OF)}
            | ({_ADAPTER_OF + base_model} if base_model and is_repository else set())
        ),
    )
    base = "a causal language model"
    if base_model is not None:
        link = f"[{base_model}](https://huggingface.co/{base_model})"
        base = link if is_repository else _code(Path(base_model).name)
    layers = config.layer_indices() if config.space == "sae" else []
    saes = [(layer, _source(config, place), config.recorded_sae(place)) for place, layer in enumerate(layers)]
    libraries = [name for name in _LIBRARIES if name != "sae-lens" or config.space == "sae"]
    versions = {name: version(name) for name in libraries}
    template = _TEMPLATES.get_template("card.md.jinja")
    # Only of a model that `AutoModelForCausalLM` does not know.
    own = str((config.auto_mapping or {}).get("base_model_class", ""))
    repository = base_model if is_repository else None
    context = given | {"repository": repository, "base": base, "saes": saes, "versions": versions}
    context["own_class"] = own if own.isidentifier() else None
    return ModelCard(_signed(template.render(config=config, data=data.to_yaml(), **context).rstrip() + "\n"))


def _source(config: YaPOConfig, position: int) -> str:
    identity, path = config.recorded_sae(position), config.sae_source(position)["path"]
    if identity.get("release"):
        return f"{_code(identity['release'])}, {_code(str(identity['sae_id']))}"
    return f"a local folder, {_code(Path(path).name)}" if path else "an object that was handed in"


def _is_repository(name: str) -> bool:
    """Whether a name can be that of a repository on the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _rows(table: Any) -> list[dict[str, str]]:
    """Returns the cells of the first rows of what `explain` returned, by column."""
    if table is None:
        return []
    # Reports also know what each feature contributes to preferences.
    is_attributed = "left_out" in table and bool(table["left_out"].notna().any())
    rows: list[dict[str, str]] = []
    for row in table.head(_FEATURES).to_dict("records"):
        name = str(row["feature"]) if isinstance(row["feature"], int) else "vector"  # of a dense adapter
        label, link = (row[column] if isinstance(row[column], str) else "" for column in ("label", "link"))
        cells = {"layer": str(row["layer"]), "feature": f"[{name}]({link})" if link else name}
        cells["value"] = f"{row['value']:{'' if row['effect'] in ('held', 'turned off') else '+'}.3g}"
        if is_attributed:
            # Not all of them were left out.
            cells["nats"] = f"{row['left_out']:+.3g}" if row["left_out"] == row["left_out"] else ""
        cells["effect"] = row["effect"]
        cells |= {column: " ".join(map(_code, row[column])) for column in ("promotes", "suppresses")}
        rows.append(cells | {"label": _cell(label)})
    return rows


def _code(token: str) -> str:
    """A token as code in a cell: with visible spaces, and without what would end the code or the cell."""
    return "`" + _cell(token).replace(" ", "·").replace("`", "'") + "`"


def _cell(text: str) -> str:
    return " ".join(text.split("\n")).replace("|", "¦")
