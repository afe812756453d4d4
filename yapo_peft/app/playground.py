"""What the playground does, without its page: one model, shared by all who use it, steered anew for each answer."""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteriaList

from .._utils import evaluating
from ..adapter_file.saving import save_adapter
from ..errors import AdapterFileError, ConfigError
from ..interpret import explain
from ..interpret.texts import device_and_dtype, padded, unsteered_outputs, window_of
from ..scoring.pairs import padding_of, prompt_ids
from ..tuner import YaPOConfig, steering
from ..tuner.adapters import adapter_of, steered_layers, write_code
from .streaming import RowStreamer, StopWhenSet

_CODE = "adapter_model.safetensors"


@dataclass(frozen=True)
class Dials:
    """How one user has the model steered.

    Attributes:
        multipliers: The adapters that steer, and how strongly.
        factors: Of single features, by adapter, block and feature, by what their entry is multiplied: 0 is off.
    """

    multipliers: Mapping[str, float] = field(default_factory=dict[str, float])
    factors: Mapping[tuple[str, int, int], float] = field(default_factory=dict[tuple[str, int, int], float])


class Playground:
    """A model with adapters, answering one prompt at a time.

    Every answer is steered by the dials that come with it, under a lock; between answers the model is as it was.

    Args:
        model: A `PeftModel` with YaPO adapters.
        tokenizer: The model's.
        folder: Where changed adapters are saved.
    """

    def __init__(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path = "out/app") -> None:
        self.model, self.tokenizer, self.folder = model, tokenizer, Path(folder)
        self._lock = threading.Lock()
        self._tables: dict[str, pd.DataFrame] = {}

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters."""
        return [name for name, config in self.model.peft_config.items() if isinstance(config, YaPOConfig)]

    def load(self, source: str) -> str:
        """Loads an adapter, of safetensors alone, and returns its name.

        Args:
            source: A folder, or a repository of the Hub.

        Raises:
            ConfigError: There is none, it is no YaPO adapter, or it has its code in another format.
            SAEMismatchError: It is of another model.
        """
        source = source.strip()
        if not source:
            raise ConfigError("Give the folder of an adapter, or the name of its repository.")
        self._require_safetensors(source)
        name = _free_name(re.sub(r"[^A-Za-z0-9_-]+", "-", Path(source).name).strip("-") or "adapter", self.adapters)
        with self._lock:
            try:
                self.model.load_adapter(source, name)
            except BaseException:
                if name in self.model.peft_config:
                    self.model.delete_adapter(name)
                raise
        return name

    def features(self, adapter: str, top: int = 20) -> pd.DataFrame:
        """The features of an adapter that move activations the furthest, as `explain` lists them."""
        with self._lock:
            if adapter not in self._tables:
                self._tables[adapter] = explain(
                    self.model, adapter, tokenizer=self.tokenizer, top=top, tokens=5, labels=True
                )
        return self._tables[adapter]

    def answers(
        self, prompt: str, dials: Dials, max_new_tokens: int = 80, temperature: float = 0.0, seed: int = 0
    ) -> Generator[tuple[str, str]]:
        """Answers a prompt unsteered and steered, side by side, and gives both texts as they grow.

        Closing the generator ends the work.

        Raises:
            ConfigError: The prompt is empty or too long, or a dial has no meaning.
        """
        ids = self._ids(prompt, max_new_tokens)
        for name in dials.multipliers:
            adapter_of(self.model, name)
        steps: queue.Queue[Tensor | BaseException | None] = queue.Queue()
        stop = threading.Event()

        def work() -> None:
            try:
                self._generate(ids, dials, max_new_tokens, temperature, seed, RowStreamer(steps), stop)
                steps.put(None)
            except BaseException as error:
                steps.put(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        tokens: list[list[int]] = [[], []]
        ended = [False, False]
        ends = _end_tokens(self.model)
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

    def activity(self, text: str, adapter: str, feature: tuple[int, int]) -> list[tuple[str, float]]:
        """The tokens of a text, and how far a feature (block and index) is on at each, unsteered."""
        _, _, layers = adapter_of(self.model, adapter)
        layer = next((layer for layer in layers if layer.index == feature[0]), None)
        sae = layer.yapo_sae[adapter] if layer is not None else None
        if layer is None or sae is None:
            raise ConfigError(f"Adapter {adapter!r} has no feature {feature[1]} at block {feature[0]}.")
        ids = cast(list[int], self.tokenizer(text)["input_ids"])
        if not ids:
            return []
        device, dtype = device_and_dtype(self.model)
        with self._lock, evaluating(self.model), torch.no_grad():
            h = unsteered_outputs(self.model, [layer], padded([ids], self.tokenizer, device))[layer.index]
            values = sae.select(torch.tensor([feature[1]], device=device), device, dtype).encode(h)[0][0, :, 0]
        tokens = [str(self.tokenizer.decode([token])) for token in ids]
        return list(zip(tokens, values.float().tolist(), strict=True))

    def save(self, adapter: str, dials: Dials, name: str) -> Path:
        """Saves an adapter as it is dialled: factors in its code, and its multiplier as the one that it loads with.

        Raises:
            ConfigError: The name is no plain one, or taken.
        """
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
            raise ConfigError(f"{name!r} is no name for an adapter here: use letters, digits, - and _.")
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
            raise ConfigError("The prompt is empty: say something to the model.")
        chat = getattr(self.tokenizer, "chat_template", None)
        ids = prompt_ids([{"role": "user", "content": prompt}] if chat else prompt, self.tokenizer)
        window = window_of(self.model)
        if window is not None and len(ids) + max_new_tokens > window:
            raise ConfigError(
                f"The prompt has {len(ids)} tokens, and the model's window of {window} has to hold {max_new_tokens} "
                "more: shorten one of them."
            )
        return ids

    @torch.no_grad()
    def _generate(
        self,
        ids: list[int],
        dials: Dials,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        streamer: RowStreamer,
        stop: threading.Event,
    ) -> None:
        device, _ = device_and_dtype(self.model)
        rows = torch.tensor([ids, ids], device=device)
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        with self._lock, evaluating(self.model), self._dialled(dials), torch.random.fork_rng():
            if stop.is_set():
                return
            torch.manual_seed(seed)
            self.model.generate(
                input_ids=rows,
                attention_mask=torch.ones_like(rows),
                max_new_tokens=max_new_tokens,
                pad_token_id=padding_of(self.tokenizer),
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([StopWhenSet(stop)]),
                **sampling,
            )

    @contextmanager
    def _dialled(self, dials: Dials) -> Generator[None]:
        """Within it, the second row of a batch is steered by the dials, and the first one is not."""
        # Which puts everything back that is set here.
        with steering(self.model, 0.0), self._changed_codes(dials):
            for layer in steered_layers(self.model):
                layer.activate([name for name in dials.multipliers if name in layer.yapo_code])
                for name in layer.active_adapters:
                    layer.multiplier[name] = torch.tensor([0.0, dials.multipliers[name]])
            yield

    @contextmanager
    def _changed_codes(self, dials: Dials) -> Generator[None]:
        """Within it, entries of single features are multiplied by their factors."""
        changed = {(name, layer) for name, layer, _ in dials.factors}
        found = [
            (layer, name, layer.code(name).detach().clone())
            for layer in steered_layers(self.model)
            for name in layer.yapo_code
            if (name, layer.index) in changed
        ]
        try:
            for layer, name, code in found:
                code = code.clone()
                for (adapter, index, feature), factor in dials.factors.items():
                    if (adapter, index) == (name, layer.index):
                        code[feature] *= factor
                write_code(layer, name, code)
            yield
        finally:
            for layer, name, code in found:
                write_code(layer, name, code)

    def _require_safetensors(self, source: str) -> None:
        config = PeftConfig.from_pretrained(source) if Path(source).is_dir() else _from_hub(source)
        if not isinstance(config, YaPOConfig):
            raise ConfigError(f"{source!r} is an adapter of another method ({type(config).__name__}).")
        if Path(source).is_dir() and not (Path(source) / _CODE).is_file():
            raise AdapterFileError(f"{source!r} has no {_CODE}; other formats can run code, and are not loaded here.")


def _from_hub(source: str) -> PeftConfig:
    """The config of an adapter of the Hub, once it is known to have its code as safetensors.

    Raises:
        ConfigError: There is no such repository, or no adapter of that kind in it.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        hf_hub_download(source, _CODE)
        return PeftConfig.from_pretrained(source)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ConfigError(
            f"{source!r} is neither a folder nor a repository with {_CODE} in reach ({type(error).__name__})."
        ) from error


def _free_name(name: str, taken: list[str]) -> str:
    number = 2
    found = name
    while found in taken:
        found, number = f"{name}-{number}", number + 1
    return found


def _end_tokens(model: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    return set() if ends is None else set(ends if isinstance(ends, list) else [ends])
