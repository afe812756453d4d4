"""The model card of an adapter: what it steers, with which SAE, how it was trained, and how to use it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from huggingface_hub import ModelCard, ModelCardData
from torch import nn

from ..errors import ConfigError
from ..tuner.config import YaPOConfig

PAPER = "https://arxiv.org/abs/2601.08441"
_WHAT = {
    "sae": f"at each steered block, one entry for each feature of a frozen sparse autoencoder ([YaPO]({PAPER})).",
    "dense": "at each steered block, a vector that is added to the block's output.",
}
_LIBRARIES = ("yapo-peft", "peft", "transformers", "trl", "sae-lens", "torch")
_TAGS = {
    "sae": ("yapo", "steering", "activation-steering", "sparse-autoencoder"),
    "dense": ("yapo", "steering", "activation-steering"),
}
_TITLES = {"sae": "Sparse steering adapter", "dense": "Steering adapter"}
_FEATURES = 10
_PICTURE = "Effect by multiplier"
# What is left of the template that PEFT fills in for a folder without a card.
_UNFILLED = "[More Information Needed]"


def model_card(
    model: nn.Module,
    adapter_name: str | None = None,
    *,
    repo_id: str | None = None,
    dataset: str | None = None,
    metrics: Mapping[str, float] | None = None,
    training: Mapping[str, Any] | None = None,
    features: Any = None,
    picture: str | None = None,
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
        picture: Name of a picture beside the card, such as a dose-response.
        chat: Whether the snippet uses the tokenizer's chat template.

    Returns:
        The card, with `save` and `push_to_hub`.

    Raises:
        ConfigError: The model has no such adapter.
    """
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    active = getattr(model, "active_adapter", None)
    name = adapter_name or (active if isinstance(active, str) else next(iter(configs), ""))
    config = configs.get(name)
    if not isinstance(config, YaPOConfig):
        raise ConfigError(f"There is no YaPO adapter {name!r} in {type(model).__name__}.")
    base = config.base_model_name_or_path or cast(str, getattr(model, "name_or_path", "")) or None
    said: dict[str, Any] = {
        "dataset": dataset,
        "metrics": metrics,
        "training": training,
        "features": features,
        "picture": picture,
    }
    return card_of(config, base, repo_id=repo_id, chat=chat, **said)


def card_of(
    config: YaPOConfig,
    base_model: str | None,
    *,
    repo_id: str | None = None,
    dataset: str | None = None,
    metrics: Mapping[str, float] | None = None,
    training: Mapping[str, Any] | None = None,
    features: Any = None,
    picture: str | None = None,
    chat: bool = False,
) -> ModelCard:
    """As `model_card`, from the adapter's config."""
    is_repository = base_model is not None and not Path(base_model).exists()
    is_local_data = dataset is not None and Path(dataset).exists()
    data = ModelCardData(
        library_name="peft",
        pipeline_tag="text-generation",
        base_model=base_model if is_repository else None,
        base_model_relation="adapter" if is_repository else None,
        datasets=[dataset] if dataset is not None and not is_local_data else None,
        tags=list(_TAGS[config.space]),
    )
    sections = [
        f"# {repo_id.rpartition('/')[2] if repo_id else _TITLES[config.space]}",
        f"A steering adapter for {_link(base_model, is_repository)}: {_WHAT[config.space]} Its multiplier is "
        f"dialled at "
        "inference: 1 as made, 0 off, negative for the opposite.",
        "## What it steers\n\n" + _layers(config),
        "## Use\n\n" + _snippet(config, base_model, repo_id, chat),
    ]
    if dataset or training:
        known = {"dataset": Path(dataset).name if dataset and is_local_data else dataset, **(training or {})}
        settings = [f"| {name} | {value} |" for name, value in known.items() if value is not None]
        sections.append("## Training\n\n| | |\n|---|---|\n" + "\n".join(settings))
    if metrics:
        rows = [f"| {name} | {value:.4g} |" for name, value in metrics.items()]
        sections.append("## Evaluation\n\n| metric | value |\n|---|---|\n" + "\n".join(rows))
    sections += _found(features, picture)
    libraries = [name for name in _LIBRARIES if name != "sae-lens" or config.space == "sae"]
    sections.append("## Versions\n\n" + "\n".join(f"- {name} {version(name)}" for name in libraries))
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def add_findings(card: ModelCard, *, features: Any = None, picture: str | None = None) -> ModelCard:
    """Puts a table of features and a picture into a card, in place of those that it had; the rest of it stays.

    Args:
        card: The card of an adapter.
        features: The table that `yapo_peft.interpret.explain` returned; its first rows are listed.
        picture: Name of a picture beside the card.

    Returns:
        Another card.
    """
    card = ModelCard(card.content)
    for section in _found(features, picture):
        title = re.escape(section.split("\n", 1)[0])
        own = re.search(rf"^{title} *\n.*?(?=^## |\Z)", card.text, re.MULTILINE | re.DOTALL)
        last = re.search(r"^## Versions", card.text, re.MULTILINE)
        start = own.start() if own else last.start() if last else len(card.text)
        end = own.end() if own else start
        card.text = f"{card.text[:start].rstrip()}\n\n{section}\n\n{card.text[end:].lstrip()}".rstrip() + "\n"
    return card


def save_card(config: YaPOConfig, folder: Path) -> None:
    """Saves a card beside an adapter; one that someone has written only gets the method's tags."""
    file = folder / "README.md"
    if not file.exists() or _UNFILLED in file.read_text(encoding="utf-8"):
        card_of(config, config.base_model_name_or_path).save(file)
        return
    card = ModelCard.load(file)
    data = cast(Any, card.data)
    data.tags = sorted({*(data.tags or []), *_TAGS[config.space]})
    card.save(file)


def _link(base_model: str | None, is_repository: bool) -> str:
    if base_model is None:
        return "a causal language model"
    return f"[{base_model}](https://huggingface.co/{base_model})" if is_repository else f"`{Path(base_model).name}`"


def _layers(config: YaPOConfig) -> str:
    steered = f"Tokens: `positions={config.positions!r}`. Multiplier when loaded: {config.multiplier:g}."
    if config.space == "dense":
        return f"Blocks: {', '.join(map(str, config.layer_indices()))}. {steered}"
    lines = ["| block | SAE | features | architecture | hash of its weights |", "|---|---|---|---|---|"]
    for position, (layer, identity) in enumerate(zip(config.layer_indices(), config.sae_identity or [], strict=False)):
        path = config.sae_source(position)["path"]
        name = f"a local folder, `{Path(path).name}`" if path else "an object that was handed in"
        if identity.get("release"):
            name = f"`{identity['release']}`, `{identity['sae_id']}`"
        hashed = str(identity.get("content_hash", ""))[:12]
        lines.append(f"| {layer} | {name} | {identity.get('d_sae')} | {identity.get('architecture')} | `{hashed}` |")
    return "\n".join([*lines, "", steered])


def _found(features: Any, picture: str | None) -> list[str]:
    """The sections of what was measured and read."""
    sections: list[str] = []
    if picture is not None:
        sections.append(f"## What it does\n\n![{_PICTURE}]({picture})")
    if features is not None and len(features):
        sections.append(f"## Features\n\n{_features(features)}")
    return sections


def _features(table: Any) -> str:
    """The first rows of what `explain` returned."""
    # A report knows what each contributes to preferences, too.
    is_attributed = "left_out" in table and bool(table["left_out"].notna().any())
    columns = ["block", "feature", "value", *(["nats"] if is_attributed else []), "effect", "promotes", "suppresses"]
    lines = [f"| {' | '.join([*columns, 'label'])} |", "|---" * (len(columns) + 1) + "|"]
    for row in table.head(_FEATURES).to_dict("records"):
        # Of a dense adapter there is none.
        name = str(row["feature"]) if isinstance(row["feature"], int) else "vector"
        label, link = (row[column] if isinstance(row[column], str) else "" for column in ("label", "link"))
        linked = f"[{name}]({link})" if link else name
        tokens = [" ".join(_code(token) for token in row[column]) for column in ("promotes", "suppresses")]
        cells = [str(row["layer"]), linked, f"{row['value']:+.3g}", row["effect"], *tokens, _cell(label)]
        if is_attributed:
            # Not all of them were left out.
            cells.insert(3, f"{row['left_out']:+.3g}" if row["left_out"] == row["left_out"] else "")
        lines.append(f"| {' | '.join(cells)} |")
    if is_attributed:
        lines.append("\n`nats`: by how much the effect on the preference margin falls without the feature.")
    return "\n".join(lines)


def _code(token: str) -> str:
    """A token as code in a cell; its spaces are to be seen, and what ends code or a cell is left out."""
    return "`" + _cell(token).replace(" ", "·").replace("`", "'") + "`"


def _cell(text: str) -> str:
    return " ".join(text.split("\n")).replace("|", "¦")


def _snippet(config: YaPOConfig, base_model: str | None, repo_id: str | None, chat: bool) -> str:
    identities = config.sae_identity or [{}]
    register = ""
    if config.space == "sae" and not all(identity.get("release") for identity in identities):
        register = (
            "\nfrom sae_lens import SAE\n\n"
            'yapo_peft.register_sae(SAE.load_from_disk("folder/of/the/sae"))  # the one of the table above\n'
        )
    prompt = (
        'inputs = tokenizer.apply_chat_template(\n    [{"role": "user", "content": "Tell me about your day."}],\n'
        '    add_generation_prompt=True, return_tensors="pt", return_dict=True,\n)'
        if chat
        else 'inputs = tokenizer("Today I", return_tensors="pt")'
    )
    return (
        "```python\n"
        "import yapo_peft  # before PEFT loads the adapter, which does not know the method otherwise\n"
        "from peft import AutoPeftModelForCausalLM\n"
        "from transformers import AutoTokenizer\n"
        f"{register}\n"
        f'model = AutoPeftModelForCausalLM.from_pretrained("{repo_id or "folder/of/this/adapter"}").eval()\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{base_model or "the base model"}")\n'
        f"{prompt}\n"
        "with yapo_peft.steering(model, multiplier=1.0):\n"
        "    answer = model.generate(**inputs, max_new_tokens=40)\n"
        "print(tokenizer.decode(answer[0], skip_special_tokens=True))\n"
        "```\n\n"
        "Without `import yapo_peft` PEFT says `KeyError: 'YAPO'`: `pip install yapo-peft`."
    )
