"""Folds constant shifts into biases of the model, so that it runs without this package."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .._utils import evaluating
from ..errors import AdapterFileError, UnsupportedOperationError
from ..steering.formula import Multiplier, vector_of
from .hooks import block_outputs
from .layer import YaPOLayer


def merge_adapters(
    model: nn.Module,
    layers: list[YaPOLayer],
    adapter_names: list[str] | None,
    safe_merge: bool,
    in_place: bool,
) -> None:
    """Folds adapters into biases of their layers; leaves the model as it was if that would not be exact.

    Args:
        model: The transformers model.
        layers: Its steered layers.
        adapter_names: The adapters; the active ones of each layer if None.
        safe_merge: Check that no bias becomes NaN or infinite.
        in_place: Only change existing parameters; add none.

    Raises:
        AdapterFileError: With `safe_merge`, a bias would become NaN or infinite.
        UnsupportedOperationError: The shift depends on the token, or the architecture has no bias for it.
    """
    names = {
        layer: [name for name in check_adapters_to_merge(layer, adapter_names) if name in layer.yapo_code]
        for layer in layers
    }
    layers = [layer for layer in layers if names[layer]]
    shifts = [torch.stack([constant_shift(layer, name) for name in names[layer]]).sum(dim=0) for layer in layers]
    require_biases(model, layers, in_place)
    before = [(layer, layer.active_adapters, layer.merged_adapters, len(layer.replaced_biases)) for layer in layers]
    try:
        for layer in layers:
            # Those of before are in the biases, and the others steer on top.
            layer.merged_adapters = []
            layer.activate(names[layer])
        steered = probe(model, layers)
        fold(layers, shifts, safe_merge)
        for layer, _, merged, _ in before:
            layer.merged_adapters = [*merged, *names[layer]]
        require_same_outputs(steered, probe(model, layers), shifts, next(model.parameters()).dtype)
    except Exception:
        for layer, _, merged, biases in before:
            layer.restore_biases(biases)
            layer.merged_adapters = merged
        raise
    finally:
        for layer, active, _, _ in before:
            layer.activate(active)


def constant_shift(layer: YaPOLayer, adapter_name: str) -> Tensor:
    """Returns the shift of an adapter if it is the same for every token.

    Where `multiplier * code >= 0`, `ReLU(f + multiplier * code) - f` is `multiplier * code`, whatever the token.

    Returns:
        The shift, `(d_model,)` in float32.

    Raises:
        UnsupportedOperationError: The shift depends on the token or the row.
    """
    multiplier: Multiplier = layer.multiplier[adapter_name]
    if isinstance(multiplier, Tensor):
        raise _not_mergeable(adapter_name, "its multiplier differs by row (set one with set_multiplier)")
    reason = token_dependence(layer, adapter_name, multiplier)
    if reason is not None:
        raise _not_mergeable(adapter_name, reason)
    return full_shift(layer, adapter_name, multiplier)


def token_dependence(layer: YaPOLayer, adapter_name: str, multiplier: float) -> str | None:
    """Returns the reason why the shift of an adapter depends on the token; None if it does not."""
    if layer.positions[adapter_name] != "all":
        return f"it steers only the tokens of positions={layer.positions[adapter_name]!r}"
    code, sae = layer.code(adapter_name).detach(), layer.yapo_sae[adapter_name]
    if sae is None:
        return None
    if layer.clamps[adapter_name]:
        return "it holds features at values (mode='clamp')"
    if sae.normalization != "none":
        return f"its SAE scales each token by itself ({sae.normalization!r})"
    cut = int((multiplier * code < 0).sum())
    if not cut:
        return None
    return (
        f"at multiplier {multiplier:g} it lowers {cut} of its {int(code.count_nonzero())} features of layer "
        f"{layer.index}, each by no more than its activation"
    )


def full_shift(layer: YaPOLayer, adapter_name: str, multiplier: float) -> Tensor:
    """Returns the shift of an adapter if no feature is cut, `(d_model,)` in float32."""
    return vector_of(multiplier * layer.code(adapter_name), layer.yapo_sae[adapter_name])


def fold(layers: list[YaPOLayer], shifts: list[Tensor], safe_merge: bool) -> None:
    """Adds constants to the outputs of layers, through the biases of their last linear modules.

    Raises:
        AdapterFileError: With `safe_merge`, a bias would become NaN or infinite.
        UnsupportedOperationError: A layer has no such module.
    """
    for layer, shift in zip(layers, shifts, strict=True):
        projection: Any = output_projection(layer)
        old = torch.zeros_like(shift) if projection.bias is None else projection.bias.detach().to(shift)
        new = (old + shift).to(projection.weight.device, projection.weight.dtype)
        if safe_merge and not new.isfinite().all():
            raise AdapterFileError(f"Merging layer {layer.index} gives a bias with NaN or infinity.")
        layer.replaced_biases.append((projection, projection.bias))
        projection.bias = nn.Parameter(new, requires_grad=False)


def output_projection(layer: YaPOLayer) -> nn.Linear | Conv1D:
    """Returns the last linear module of a layer that is as wide as the layer's output.

    Raises:
        UnsupportedOperationError: There is none, or the layer holds another method's adapter.
    """
    modules = list(layer.block.modules())
    if any(isinstance(module, BaseTunerLayer) and not isinstance(module, YaPOLayer) for module in modules):
        raise UnsupportedOperationError(
            f"Layer {layer.index} holds another method's adapter too: merge or unload that one first."
        )
    name, code = next(iter(layer.yapo_code.items()))
    sae = layer.yapo_sae[name]
    width = len(code) if sae is None else sae.identity.d_in
    linear = [module for module in modules if isinstance(module, nn.Linear | Conv1D) and _width(module) == width]
    if not linear:
        raise UnsupportedOperationError(
            f"A YaPO adapter cannot be merged: {type(layer.block).__name__} has no linear module as wide as its "
            "output. Keep the adapter attached."
        )
    return linear[-1]


def require_biases(model: Any, layers: list[YaPOLayer], in_place: bool) -> None:
    """Checks that a merged model can be saved and loaded, or synchronised with an engine that runs the unmerged one.

    Raises:
        UnsupportedOperationError: The layers have no bias and cannot be given one, or their weights are quantised.
    """
    if any(not output_projection(layer).weight.is_floating_point() for layer in layers):
        raise UnsupportedOperationError(
            "A YaPO adapter cannot be merged into a quantised model: merge it into the model in full precision."
        )
    has_biases = all(output_projection(layer).bias is not None for layer in layers)
    if has_biases:
        return
    if in_place:
        # TRL sends merged parameters to vLLM, which drops biases that its own copy of the model lacks.
        raise UnsupportedOperationError(
            f"A YaPO adapter cannot be merged in place into {type(model).__name__}: its layers end in a linear module "
            "without a bias. merge_and_unload() may give them one, where the model's config has a switch for it."
        )
    if getattr(_config(model), "mlp_bias", None) is None:
        raise UnsupportedOperationError(
            f"A YaPO adapter cannot be merged into {type(model).__name__}: its layers end in a linear module without a "
            "bias, and its config has no mlp_bias to give them one. Keep the adapter attached."
        )


def complete_biases(model: Any, merged: list[nn.Module]) -> None:
    """If merging added biases to some MLPs, adds zero biases to the others, and sets `mlp_bias` in the config."""
    config = _config(model)
    if getattr(config, "mlp_bias", None) is not False or not merged:
        return
    config.mlp_bias = True
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.bias is None and ".mlp." in name:
            zeros = torch.zeros(module.out_features, device=module.weight.device, dtype=module.weight.dtype)
            module.bias = nn.Parameter(zeros, requires_grad=False)


@torch.no_grad()
def probe(model: nn.Module, layers: list[YaPOLayer]) -> list[Tensor]:
    """Outputs of steered layers on a few tokens, `(1, 8, d_model)` in float32, to compare before and after merging."""
    embeddings: nn.Embedding = model.get_input_embeddings()  # pyright: ignore
    ids = torch.arange(8, device=embeddings.weight.device)[None] % embeddings.num_embeddings
    with evaluating(model), block_outputs(layers) as outputs:
        model(input_ids=ids)
    return [outputs[layer.index].float() for layer in layers]


def require_same_outputs(before: list[Tensor], after: list[Tensor], shifts: list[Tensor], dtype: torch.dtype) -> None:
    """Checks that merged layers output the same as steered ones, up to rounding.

    Raises:
        UnsupportedOperationError: The layers do not just add their last linear module to the residual stream.
    """
    eps = torch.finfo(dtype).eps
    for steered, merged, shift in zip(before, after, shifts, strict=True):
        # In float32 a layer after the bias that does next to nothing shows too, as the experts of gpt-oss may.
        allowed = 4 * eps * steered.norm(dim=-1) + min(0.01, 1000 * eps) * shift.norm()
        if ((steered - merged).norm(dim=-1) > allowed).any():
            raise UnsupportedOperationError(
                "A YaPO adapter cannot be merged into this architecture: its layers scale or normalise the output of "
                "their last linear module, so that no bias equals the steering. Keep the adapter attached."
            )


def _config(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)


def _width(module: nn.Linear | Conv1D) -> int:
    return module.out_features if isinstance(module, nn.Linear) else module.nf


def _not_mergeable(adapter_name: str, reason: str) -> UnsupportedOperationError:
    return UnsupportedOperationError(
        f"Adapter {adapter_name!r} cannot be merged: {reason}, so its shift is not a constant that a bias could hold. "
        "Keep the adapter attached, or call unload() for the model without it."
    )
