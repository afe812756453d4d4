"""How well an SAE fits a model: what it reconstructs, with how many features, and at what loss; and the page of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .._utils import at_least, device_of, evaluating, replacing
from ..errors import ConfigError, DatasetError
from ..sae.frozen import layer_read
from ..sae.loader import read_sae
from ..scoring.checks import context_length
from ..tuner.blocks import base_of, decoder_blocks, hidden_size, hidden_states, resolve_layers, with_hidden_states
from ..tuner.hooks import forward_hooks
from .activations import Activations
from .config import SAETrainingConfig
from .rows import rows_of
from .saes import require_width

# Logits that are computed at once.
_LOGITS = 1 << 28
_TEMPLATES = Environment(loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True)
_ROWS = {
    "explained_variance": "explained variance",
    "l0": "active features per token (L0)",
    "dead_features": "dead features",
    "loss_recovered": "loss recovered, relative to the mean",
    "loss_recovered_from_zero": "loss recovered, relative to zero",
    "loss": "next-token loss (nats)",
    "loss_with_reconstruction": "next-token loss with the reconstruction (nats)",
}


def measure_sae(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[Any],
    *,
    release: str | None = None,
    sae_id: str | None = None,
    path: str | None = None,
    layer: int | None = None,
    tokens: int = 100_000,
    context: int = 256,
    batch_size: int = 32,
) -> dict[str, float]:
    """Measures how well an SAE fits a model on text that it should not have been trained on.

    The first token of each sequence, special tokens and attention sinks (more than ten times the median norm) are left
    out: their activations are neither counted nor replaced.

    Args:
        model: A transformers causal language model; if it has adapters, they are measured with it.
        tokenizer: The model's tokenizer.
        texts: Texts, conversations, or rows with a column `text`, `messages`, or `prompt` and an answer.
        release: Name of a release in sae-lens' directory or on the Hub; requires `sae_id`.
        sae_id: Name of the SAE within the release.
        path: Folder of a local SAE, instead.
        layer: Layer whose output the SAE reads. Default: the one that it was trained on.
        tokens: Number of tokens to measure on; fewer if the texts have fewer.
        context: Tokens per sequence. Longer texts are split.
        batch_size: Sequences per forward pass.

    Returns:
        `tokens`: the number of tokens that count. `explained_variance`: the share of the variance around the mean that
        the reconstruction explains. `l0`: active features per token. `dead_features`: share of the features that are
        never active. `loss`, `loss_with_reconstruction`, `loss_with_mean`, `loss_with_zero`: the model's loss in nats
        per token, and that with the layer's output replaced. `loss_recovered`: the share of the loss that replacing by
        the mean costs, that the reconstruction avoids; `loss_recovered_from_zero`: the same for replacing by zero.

    Raises:
        ConfigError: The layer is unknown or out of range, or the SAE has another width than the model.
        DatasetError: The texts have no tokens that count.
        SAENotFoundError: There is no such SAE.
    """
    at_least(2, tokens=tokens, context=context)
    at_least(1, batch_size=batch_size)
    sae = read_sae(release=release, sae_id=sae_id, path=path)
    layer = layer_read(sae.cfg.metadata.hook_name) if layer is None else layer
    if layer is None:
        raise ConfigError("The SAE does not say which layer it reads: pass layer=.")
    require_width(sae, hidden_size(base_of(model)))
    blocks = decoder_blocks(base_of(model))[1]
    (layer,) = resolve_layers([layer], len(blocks))
    context = min(context, context_length(base_of(model)) or context)
    config = SAETrainingConfig(layer, context=context, forward_batch_size=batch_size, loss_tokens=tokens)
    rows = rows_of(texts, tokenizer, context, tokens)
    activations = Activations(model, {layer: blocks[layer]}, rows, tokenizer, config)
    return measures_of(sae, model, layer, activations, activations.statistics()[layer].limit, config)


@torch.no_grad()
def measures_of(
    sae: Any, model: nn.Module, layer: int, activations: Activations, limit: float, config: SAETrainingConfig
) -> dict[str, float]:
    """Measures an SAE of sae-lens on activations whose norm is below a limit; see `measure_sae`."""
    # The layer's, or where accelerate runs it if its weights are offloaded.
    device = device_of(nn.ModuleList([activations.blocks[layer], model]))
    before = sae.device, sae.dtype
    sae = sae.to(device=device, dtype=torch.float32)
    fired = torch.zeros(sae.cfg.d_sae, dtype=torch.bool, device=device)
    count, active, error = 0, 0, 0.0
    total, squares = torch.zeros(sae.cfg.d_in, dtype=torch.float64, device=_exact(device)), 0.0
    size = config.forward_batch_size
    indices = range(len(activations.rows))
    for start in tqdm(range(0, len(indices), size), desc=f"Measuring layer {layer}", unit="batch"):
        h = activations.of(list(indices[start : start + size]), {layer: limit})[layer].to(device).float()
        features = sae.encode(h)
        fired |= (features > 0).any(0)
        active += int((features > 0).sum())
        error += float((sae.decode(features) - h).square().sum())
        count += len(h)
        exact = h.to(total.device).double()
        total += exact.sum(0)
        squares += float(exact.square().sum())
    if not count:
        raise DatasetError("The text has no tokens to measure on: pass longer texts.")
    mean = (total / count).float().to(device)
    variance = squares - count * float(total.div(count).square().sum())
    loss_of = partial(_loss, model, layer, activations, activations.sample(config.loss_tokens), limit)
    clean, reconstructed = loss_of(lambda h: h), loss_of(sae)
    zeroed, averaged = loss_of(torch.zeros_like), loss_of(lambda h: mean.expand_as(h))
    sae.to(*before)
    return {
        "tokens": count,
        "explained_variance": 1 - error / variance,
        "l0": active / count,
        "dead_features": 1 - float(fired.float().mean()),
        "loss": clean,
        "loss_with_reconstruction": reconstructed,
        "loss_with_mean": averaged,
        "loss_with_zero": zeroed,
        "loss_recovered": (averaged - reconstructed) / (averaged - clean) if averaged != clean else float("nan"),
        "loss_recovered_from_zero": (zeroed - reconstructed) / (zeroed - clean) if zeroed != clean else float("nan"),
    }


def _exact(device: torch.device) -> torch.device:
    """A device that has float64."""
    return torch.device("cpu") if device.type == "mps" else device


def _loss(
    model: nn.Module,
    layer: int,
    activations: Activations,
    indices: list[int],
    limit: float,
    replacement: Callable[[Tensor], Tensor],
) -> float:
    """The model's loss in nats per token, with a layer's output replaced at the tokens that count."""
    total, count = 0.0, 0
    width = max(len(activations.rows[index]) for index in indices) * base_of(model).config.get_text_config().vocab_size
    with evaluating(model):
        for _, inputs, counts in activations.batches(indices, max(1, _LOGITS // width)):
            with forward_hooks([(activations.blocks[layer], partial(_replaced, replacement, counts, limit))]):
                logits = model(**inputs, use_cache=False).logits[:, :-1]
            scored = inputs["attention_mask"][:, 1:].bool().to(logits.device)
            targets = inputs["input_ids"][:, 1:].to(logits.device)[scored]
            total += float(nn.functional.cross_entropy(logits[scored].float(), targets, reduction="sum"))
            count += len(targets)
    return total / count


def _replaced(replacement: Callable[[Tensor], Tensor], counts: Tensor, limit: float, output: Any) -> Any:
    """A layer's output, replaced at the tokens that count."""
    h = hidden_states(output)
    replaced = (counts.to(h.device) & (h.float().norm(dim=-1) < limit))[..., None]
    return with_hidden_states(output, torch.where(replaced, replacement(h.float()).to(h.dtype), h))


def save_page(
    folder: Path,
    model_name: str | None,
    measures: Mapping[int, Mapping[str, float]],
    before: Mapping[int, Mapping[str, float]],
    config: SAETrainingConfig,
) -> None:
    """Writes `README.md` with the measures of SAEs, and of those that they started from, by layer."""
    columns = [
        (f"layer {layer}{suffix}", found[layer])
        for layer in measures
        for suffix, found in ((", before", before), ("", measures))
        if layer in found
    ]
    rows = [(text, [_written(name, found[name]) for _, found in columns]) for name, text in _ROWS.items()]
    first = next(iter(measures.values()))
    text = _TEMPLATES.get_template("page.md.jinja").render(
        model=model_name,
        layers=list(measures),
        columns=[name for name, _ in columns],
        rows=rows,
        tokens=int(first["tokens"]),
        config=config,
        settings=[(name, value) for name, value in asdict(config).items() if value is not None and name != "store"],
        versions=[(name, version(name)) for name in ("yapo-peft", "sae-lens", "transformers", "torch")],
    )
    with replacing(folder / "README.md") as partial:
        partial.write_text(text, encoding="utf-8")


def _written(name: str, value: float) -> str:
    if name == "dead_features":
        return f"{value:.2%}"
    return f"{value:.1f}" if name == "l0" else f"{value:.4f}"


def hub_name(model: Any) -> str | None:
    """The name of a model on the Hub; None if it is of a local folder."""
    name = getattr(model, "name_or_path", "") or ""
    return None if not name or Path(name).exists() else name
