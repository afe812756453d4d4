"""Converts between the tensors of an adapter in a model and those in its file."""

from __future__ import annotations

from torch import Tensor, nn

from ..adapter_file.codes import pack_codes, unpack_codes
from ..adapter_file.parts import pack_part, unpack_part
from ..sae import FrozenSAE, SAEPart
from .blocks import hidden_size, is_code
from .config import YaPOConfig
from .layer import YaPOLayer


def to_file(model: nn.Module, config: YaPOConfig, adapter_name: str, selected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Packs the tensors of an adapter, `selected` by their names without the adapter's, for its file.

    Raises:
        UnsupportedOperationError: The adapter is self-contained, but its code needs the whole SAE.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, YaPOLayer)}
    codes: dict[str, Tensor] = {}
    saes: dict[str, FrozenSAE | None] = {}
    for name, code in selected.items():
        if is_code(name):
            layer = layers[name.partition(".yapo_code.")[0]]
            codes[name] = layer.code(adapter_name) if code.is_meta else code
            saes[name] = layer.yapo_sae[adapter_name]
    by_layer = sorted(codes, key=lambda name: layers[name.partition(".yapo_code.")[0]].index)
    config.forget_damage_of_others(codes[name] for name in by_layer)
    packed = pack_codes(codes, {name: sae and sae.identity for name, sae in saes.items()})
    if config.self_contained:
        for name, sae in saes.items():
            packed |= {} if sae is None else pack_part(name, packed, sae, config.mode == "clamp")
    return packed


def from_file(model: nn.Module, config: YaPOConfig, adapter_name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Unpacks the tensors of an adapter's file, and returns them by their names in a model.

    Raises:
        AdapterFileError: A tensor is missing, unknown, or has a type, shape or index that does not fit.
        SAEMismatchError: A code was saved with another SAE.
    """
    # PEFT has already given those of `modules_to_save` their names in the model.
    others = {name: tensor for name, tensor in tensors.items() if f".modules_to_save.{adapter_name}." in name}
    packed = {name: tensor for name, tensor in tensors.items() if name not in others}
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, YaPOLayer) and adapter_name in layer.yapo_code
    }
    saes = {layer.index: layer.yapo_sae[adapter_name] for layer in layers.values()}
    codes = unpack_codes(packed, {index: sae and sae.identity for index, sae in saes.items()}, hidden_size(model))
    config.forget_damage_of_others(codes[index] for index in sorted(codes))
    for index, sae in saes.items():
        if isinstance(sae, SAEPart):
            sae.fill(*unpack_part(index, packed, sae.identity))
    return others | {f"{name}.yapo_code.{adapter_name}": codes[layer.index] for name, layer in layers.items()}
