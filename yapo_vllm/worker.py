"""Steers in a worker: keeps its adapters, and maps the requests of each step to multipliers of tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from yapo_peft import __version__
from yapo_peft.errors import UnsupportedOperationError
from yapo_peft.tuner.positions import span_of

from .layer import Capacity, LayerSteering, Step
from .op import steer_output_of
from .request import Steering, scheduled_steering
from .served import AdapterFile, LayerPart, Prepared, Served
from .settings import Settings

# vLLM shows what its own loggers say.
logger = logging.getLogger("vllm.yapo")


class WorkerSteering:
    """The steering of a worker, attached to its model runner after the model is loaded.

    Args:
        runner: vLLM's model runner, V1 or V2.
        settings: The plugin's settings.

    Raises:
        UnsupportedOperationError: Steering does not support the engine's configuration.
    """

    def __init__(self, runner: Any, settings: Settings) -> None:
        config = runner.vllm_config
        _require_plain(config)
        prepared = Prepared.of(settings, config.model_config)
        self._d_model, self._depth = prepared.d_model, prepared.depth
        capacity = Capacity(runner.max_num_tokens, settings.max_adapters, prepared.features)
        self._capacity, self._step = capacity, Step(capacity, runner.device)
        self._layers: dict[int, LayerSteering] = {}
        found = _decoder_layers(runner.get_model(), self._depth)
        context = config.compilation_config.static_forward_context
        for layer in prepared.layers:
            if not any(True for _ in found[layer].parameters()):  # a placeholder: the layer is in another worker
                continue
            name = f"yapo.{layer}"
            steering = LayerSteering(
                layer, self._step, capacity, self._d_model, runner.device, config.model_config.dtype
            )
            context[name] = self._layers[layer] = steering
            steer_output_of(found[layer], name, self._d_model)
        # Part of the key of compiled graphs on disk, which without this operator would not steer.
        config.additional_config["yapo"] = {"version": __version__, "layers": list(prepared.layers)}
        self._adapters: dict[int, Served] = {}
        self._requests: dict[str, tuple[Steering, int]] = {}
        self._read: tuple[Served, dict[int, LayerPart]]
        for adapter in prepared.adapters:
            self.read(adapter.to_dict())
            self.place()
        names = ", ".join(adapter.name for adapter in prepared.adapters)
        logger.info("Steering layers %s; adapters: %s", [*prepared.layers], names or "none yet")

    def read(self, fields: dict[str, Any]) -> None:
        """Reads an adapter, to be put into its slot by `place`.

        Raises:
            YaPOError: It cannot be read or served.
        """
        adapter = Served.from_dict(fields)
        file = AdapterFile(adapter.source)
        parts = file.parts(self._d_model)
        if file.describe(adapter.id, adapter.slot, adapter.name, self._d_model, self._depth) != adapter:
            raise UnsupportedOperationError(f"{adapter.source!r} changed while it was being loaded: load it again.")
        for layer, steering in self._layers.items():
            steering.prepare(parts.get(layer))
        self._read = adapter, parts

    def place(self) -> None:
        """Puts the adapter that was read last into its slot, replacing the one there."""
        adapter, parts = self._read
        for known in [known for known, other in self._adapters.items() if other.slot == adapter.slot]:
            del self._adapters[known]
        for layer, steering in self._layers.items():
            steering.put(adapter.slot, parts.get(layer))
        self._adapters[adapter.id] = adapter

    def follow(self, scheduled: Any) -> None:
        """Updates the running requests from the scheduler's output."""
        for request in scheduled.finished_req_ids:
            self._requests.pop(request, None)
        for request in scheduled.scheduled_new_reqs:
            asked = scheduled_steering(request)
            if asked:
                # A resumed request comes again with a longer prompt, and is steered from its new end.
                self._requests[request.req_id] = asked, request.prompt_len
            else:
                self._requests.pop(request.req_id, None)

    def plan(self, requests: Sequence[str], counts: Sequence[int], positions: Tensor) -> None:
        """Sets the multipliers of a step's tokens.

        Args:
            requests: Ids of the requests, in the order of their tokens.
            counts: Number of tokens of each request.
            positions: Position of each token within its request, `(n,)`.
        """
        steered = [(place, self._requests[name]) for place, name in enumerate(requests) if name in self._requests]
        if not steered:
            self._step.clear()
            return
        multipliers = np.zeros((len(requests), self._capacity.slots), dtype=np.float32)
        starts = np.zeros((len(requests), self._capacity.slots), dtype=np.int64)
        ends = np.full_like(starts, np.iinfo(np.int64).max)
        layers: set[int] = set()
        slots: set[int] = set()
        for place, (steering, prompt_length) in steered:
            for number, multiplier in steering:
                adapter = self._adapters[number]
                multipliers[place, adapter.slot] = multiplier
                first, end = span_of(adapter.positions).within(prompt_length)
                starts[place, adapter.slot] = first
                if end is not None:
                    ends[place, adapter.slot] = end
                layers.update(adapter.layers)
                slots.add(adapter.slot)
        per_token, start, end = (
            torch.from_numpy(values.repeat(counts, axis=0)).to(positions.device, non_blocking=True)
            for values in (multipliers, starts, ends)
        )
        position = positions[: len(per_token), None]
        self._step.set(per_token.masked_fill((position < start) | (position >= end), 0), layers, slots)


def attach(runner: Any, settings: Settings) -> WorkerSteering:
    """Attaches steering to a model runner whose model is loaded and not yet compiled."""
    steering = WorkerSteering(runner, settings)
    execute = runner.execute_model

    def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        steering.follow(scheduler_output)
        return execute(scheduler_output, *args, **kwargs)

    runner.execute_model = execute_model
    if hasattr(runner, "_prepare_inputs"):
        prepare = runner._prepare_inputs

        def prepare_inputs_first(scheduler_output: Any, counts: Any, *args: Any, **kwargs: Any) -> Any:
            prepared = prepare(scheduler_output, counts, *args, **kwargs)
            steering.plan(runner.input_batch.req_ids, counts, runner.positions)
            return prepared

        runner._prepare_inputs = prepare_inputs_first
    else:
        prepare = runner.prepare_inputs

        def prepare_inputs_second(*args: Any, **kwargs: Any) -> Any:
            batch = prepare(*args, **kwargs)
            steering.plan(batch.req_ids, batch.num_scheduled_tokens, batch.positions)
            return batch

        runner.prepare_inputs = prepare_inputs_second
    return steering


def _decoder_layers(model: Any, depth: int) -> nn.ModuleList:
    get_language_model = getattr(model, "get_language_model", None)
    decoder = get_language_model() if get_language_model is not None else model
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
    if len(lists) != 1:
        raise UnsupportedOperationError(
            f"{type(model).__name__} has {len(lists)} lists of {depth} layers, expected one: this architecture cannot "
            "be steered."
        )
    return lists[0]


def _require_plain(config: Any) -> None:
    """Raises if the configuration gives a worker other tokens than the requests have, or parts of tokens."""
    parallel, compilation = config.parallel_config, config.compilation_config
    settings = {
        "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
        "microbatches (enable_dbo, ubatch_size)": parallel.use_ubatching,
        "sequence parallelism (pass_config.enable_sp)": bool(getattr(compilation.pass_config, "enable_sp", False)),
        "kv_sharing_fast_prefill": config.cache_config.kv_sharing_fast_prefill,
        "adaptive verification": bool(getattr(config.speculative_config, "enable_adaptive_verification", False)),
        "an additional_config that is not a dict": not isinstance(config.additional_config, dict),
        "a pooling model": config.model_config.runner_type == "pooling",
    }
    found = [name for name, is_set in settings.items() if is_set]
    if found:
        raise UnsupportedOperationError(f"YaPO steering does not support vLLM with {found[0]}: serve without it.")
