"""The playground without its page: one model, shared by all users and steered per answer."""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteriaList

from .._utils import at_least, evaluating, finite
from ..adapter_file.reading import SavedAdapter
from ..adapter_file.saving import save_adapter
from ..errors import ConfigError
from ..interpret import explain, find_features
from ..interpret.texts import device_and_dtype, padded
from ..methods.by_hand import entry_of
from ..scoring.checks import require_room
from ..scoring.generation import end_tokens
from ..scoring.pairs import padding_of, prompt_ids
from ..tuner import YaPOConfig, steering
from ..tuner.adapters import adapter_of, steered_layers, unsteered_outputs, write_code
from ..tuner.attaching import adapter_name_of
from ..tuner.blocks import base_of
from .streaming import RowStreamer, StopWhenSet


@dataclass(frozen=True)
class Dials:
    """One user's settings.

    Attributes:
        multipliers: Multipliers of the adapters that steer, by name.
        values: What features are set to instead, by adapter, layer and feature, as by `set_features`.
    """

    multipliers: Mapping[str, float] = field(default_factory=dict[str, float])
    values: Mapping[tuple[str, int, int], float | None] = field(default_factory=dict[tuple[str, int, int], Any])


class Playground:
    """A model with adapters that answers one prompt at a time.

    A lock is held while an answer is generated with its user's dials; afterwards the model is as before.

    Args:
        model: A `PeftModel` with YaPO adapters.
        tokenizer: The model's tokenizer.
        folder: Folder to save changed adapters in.
        max_adapters: The most adapters that are loaded at a time.
        max_new_tokens: The longest answer.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        folder: str | Path = "out/app",
        max_adapters: int = 16,
        max_new_tokens: int = 400,
    ) -> None:
        at_least(1, max_adapters=max_adapters, max_new_tokens=max_new_tokens)
        self.model, self.tokenizer, self.folder = model, tokenizer, Path(folder)
        self.max_adapters, self.max_new_tokens = max_adapters, max_new_tokens
        self._lock = threading.Lock()
        self._tables: dict[str, pd.DataFrame] = {}

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters."""
        return [name for name, config in self.model.peft_config.items() if isinstance(config, YaPOConfig)]

    def load(self, source: str) -> str:
        """Loads an adapter, and returns its name.

        Args:
            source: A folder or a Hub repository.

        Raises:
            AdapterFileError: There is no YaPO adapter in a safetensors file, or it is damaged.
            ConfigError: `max_adapters` are loaded.
            SAEMismatchError: It was made for another model.
        """
        source = source.strip()
        if not source:
            raise ConfigError("Enter the folder or the Hub repository of an adapter.")
        if len(self.adapters) >= self.max_adapters:
            raise ConfigError(f"{len(self.adapters)} adapters are loaded, the most that this playground takes.")
        SavedAdapter(source)  # raises before anything changes
        name = _free_name(adapter_name_of(source, base_of(self.model)), self.adapters)
        with self._lock:
            try:
                self.model.load_adapter(source, name)
            except BaseException:
                if name in self.model.peft_config:
                    self.model.delete_adapter(name)
                raise
        return name

    def features(self, adapter: str, top: int = 20) -> pd.DataFrame:
        """The features of an adapter that change activations the most, as listed by `explain`."""
        with self._lock:
            if adapter not in self._tables:
                self._tables[adapter] = explain(
                    self.model, adapter, tokenizer=self.tokenizer, top=top, tokens=5, labels=True
                )
        return self._tables[adapter]

    def find(self, adapter: str, query: str, by: str) -> pd.DataFrame:
        """Features of an adapter's SAEs, also those that it does not steer; see `find_features`."""
        with self._lock:
            return find_features(self.model, query, by, adapter_name=adapter, tokenizer=self.tokenizer, tokens=5)

    def values(self, places: Iterable[tuple[str, int, int]]) -> dict[tuple[str, int, int], float | None]:
        """What adapters add to features, or hold them at, by adapter, layer and feature; None for those left alone."""
        with self._lock:  # another user's answer may be generated with other codes
            return {place: self._value(*place) for place in places}

    def _value(self, adapter: str, layer: int, feature: int) -> float | None:
        found = next(each for each in adapter_of(self.model, adapter)[2] if each.index == layer)
        entry = float(found.code(adapter).detach()[feature])
        return None if entry == 0 else max(entry, 0.0) if found.clamps[adapter] else entry

    def answers(
        self, prompt: str, dials: Dials, max_new_tokens: int = 80, temperature: float = 0.0, seed: int = 0
    ) -> Generator[tuple[str, str]]:
        """Streams the unsteered and the steered answer to a prompt, as a pair of texts so far.

        Closing the generator stops the generation.

        Raises:
            ConfigError: The prompt is empty or too long, the adapter does not exist, or a setting is out of range.
        """
        at_least(1, max_new_tokens=max_new_tokens)
        if max_new_tokens > self.max_new_tokens:
            raise ConfigError(f"max_new_tokens={max_new_tokens}: must be at most {self.max_new_tokens}.")
        finite(temperature=temperature)
        if not 0 <= seed < 2**32:
            raise ConfigError(f"seed={seed}: must be between 0 and {2**32 - 1}.")
        ids = self._ids(prompt, max_new_tokens)
        for name, multiplier in dials.multipliers.items():
            adapter_of(self.model, name)
            finite(multiplier=multiplier)
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        options = {"max_new_tokens": max_new_tokens, **sampling}
        steps: queue.Queue[Tensor | BaseException | None] = queue.Queue()
        stop = threading.Event()

        def work() -> None:
            try:
                self._generate(ids, dials, seed, RowStreamer(steps), stop, **options)
                steps.put(None)
            except BaseException as error:
                steps.put(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        tokens: list[list[int]] = [[], []]
        ended = [False, False]
        ends = end_tokens(self.model, self.tokenizer)
        try:
            while (step := steps.get()) is not None:
                if isinstance(step, BaseException):
                    raise step
                for row, token in enumerate(step.tolist()):
                    ended[row] |= token in ends
                    if not ended[row]:
                        tokens[row].append(token)
                unsteered, steered = (str(self.tokenizer.decode(own, skip_special_tokens=True)) for own in tokens)
                yield unsteered, steered
        finally:
            stop.set()
            thread.join()

    def activity(self, text: str, adapter: str, feature: tuple[int, int]) -> tuple[list[str], list[float]]:
        """The tokens of a text, and the unsteered activation of a feature (layer and index) at each."""
        _, _, layers = adapter_of(self.model, adapter)
        layer = next((layer for layer in layers if layer.index == feature[0]), None)
        sae = layer.yapo_sae[adapter] if layer is not None else None
        if layer is None or sae is None:
            raise ConfigError(f"Adapter {adapter!r} has no feature {feature[1]} at layer {feature[0]}.")
        ids = cast(list[int], self.tokenizer(text)["input_ids"])
        if not ids:
            return [], []
        device, dtype = device_and_dtype(self.model)
        with self._lock, evaluating(self.model), torch.no_grad():
            h = unsteered_outputs(self.model, [layer], padded([ids], self.tokenizer, device))[layer.index]
            values = sae.select(torch.tensor([feature[1]], device=device), device, dtype).encode(h)[0][0, :, 0]
        tokens = [str(self.tokenizer.decode([token])) for token in ids]
        return tokens, values.float().tolist()

    def save(self, adapter: str, dials: Dials, name: str) -> Path:
        """Saves an adapter with a user's settings: values in its code, and the multiplier in its config.

        Raises:
            ConfigError: The name has other characters than letters, digits, "-" and "_", or is taken.
        """
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
            raise ConfigError(
                f"name={name!r}: may only have letters, digits, - and _, and must start with a letter or digit."
            )
        target = self.folder / name
        _, config, _ = adapter_of(self.model, adapter)
        with self._lock, self._changed_codes(dials):
            before, config.multiplier = config.multiplier, float(dials.multipliers.get(adapter, config.multiplier))
            try:
                return save_adapter(self.model, target, adapter)
            finally:
                config.multiplier = before

    def _ids(self, prompt: str, max_new_tokens: int) -> list[int]:
        if not prompt.strip():
            raise ConfigError("The prompt is empty: enter one.")
        chat = getattr(self.tokenizer, "chat_template", None)
        ids = prompt_ids([{"role": "user", "content": prompt}] if chat else prompt, self.tokenizer)
        require_room(base_of(self.model), len(ids), max_new_tokens)
        return ids

    @torch.no_grad()
    def _generate(
        self, ids: list[int], dials: Dials, seed: int, streamer: RowStreamer, stop: threading.Event, **options: Any
    ) -> None:
        device, _ = device_and_dtype(self.model)
        rows = torch.tensor([ids, ids], device=device)
        with self._lock, evaluating(self.model), self._dialled(dials), torch.random.fork_rng():
            if stop.is_set():
                return
            torch.manual_seed(seed)
            self.model.generate(
                input_ids=rows,
                attention_mask=torch.ones_like(rows),
                pad_token_id=padding_of(self.tokenizer),
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([StopWhenSet(stop)]),
                **options,
            )

    @contextmanager
    def _dialled(self, dials: Dials) -> Generator[None]:
        """Steers the second row of a batch of two by the dials."""
        # `steering` restores all that is set here.
        with steering(self.model, 0.0), self._changed_codes(dials):
            for layer in steered_layers(self.model):
                layer.activate([name for name in dials.multipliers if name in layer.yapo_code])
                for name in layer.active_adapters:
                    layer.multiplier[name] = torch.tensor([0.0, dials.multipliers[name]])
            yield

    @contextmanager
    def _changed_codes(self, dials: Dials) -> Generator[None]:
        """Changes entries of codes, and restores the codes afterwards."""
        changed = {(name, layer) for name, layer, _ in dials.values}
        found = [
            (layer, name, layer.code(name).detach().clone())
            for layer in steered_layers(self.model)
            for name in layer.yapo_code
            if (name, layer.index) in changed
        ]
        try:
            for layer, name, code in found:
                code = code.clone()
                for (adapter, index, feature), value in dials.values.items():
                    if (adapter, index) == (name, layer.index):
                        code[feature] = entry_of(value, f"Feature {feature} of layer {index}", layer.clamps[name])
                write_code(layer, name, code)
            yield
        finally:
            for layer, name, code in found:
                write_code(layer, name, code)


def _free_name(name: str, taken: list[str]) -> str:
    names = chain([name], (f"{name}-{number}" for number in count(2)))
    return next(found for found in names if found not in taken)
