"""Everything this package uses of TRL and of transformers' Trainer that is not part of their documented interface.

Nothing else in the package touches such names. `tests/trainer/test_trl_seams.py` lists them and fails when one moves.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from peft.utils import CONFIG_NAME
from torch import Tensor, nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl import DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.dpo_trainer import DataCollatorForPreference

from .._utils import device_of, evaluating
from ..errors import UnsupportedOperationError
from ..scoring.lm_head import AnswerHead
from .checkpoints import last_whole_checkpoint, require_resumable
from .checks import is_sharded
from .data import require_end
from .objective import take_pairs


class TRLSeams(DPOTrainer):
    """A `DPOTrainer` whose undocumented parts are overridden, called and read here only."""

    model: nn.Module
    # Tags that TRL gives the model.
    _tag_names = ["trl", "yapo"]

    # Hooks for the subclass.

    def _batch_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The loss of a batch, in training and in evaluation."""
        raise NotImplementedError

    def _prepared(self, dataset: Any, name: str, args: Any, tokenize: Callable[[], Any]) -> Any:
        """Checks a dataset and tokenizes it; called during `__init__` and by `evaluate`."""
        raise NotImplementedError

    def _extra_columns(self) -> list[str]:
        """Dataset columns, beyond TRL's, that the collator and the samplers read."""
        raise NotImplementedError

    def _save_card(self, folder: Path) -> None:
        """Called after a model was saved."""
        raise NotImplementedError

    def _clipping(self) -> AbstractContextManager[None]:
        """Entered while gradients are clipped."""
        raise NotImplementedError

    # Overridden methods, which call the hooks.

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; `resume_from_checkpoint=True` skips checkpoints that a killed process left incomplete."""
        if resume_from_checkpoint is True:
            last = last_whole_checkpoint(cast(str, self.args.output_dir), self.accelerator.print)
            resume_from_checkpoint = last or resume_from_checkpoint
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """The seam for the loss: TRL's `compute_loss` and `prediction_step` both end here."""
        loss = self._batch_loss(model, inputs)
        if not return_outputs:
            return loss
        given = self._model_inputs(inputs)
        del given["labels"], given["fused_lm_head"]
        with torch.no_grad():
            return loss, model(**given)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """The seam for dataset checks: only here are both the pairs and their tokens known."""
        require_end(dataset, processing_class)
        tokenize = super()._prepare_dataset
        return self._prepared(
            dataset, dataset_name, args, lambda: tokenize(dataset, processing_class, args, dataset_name)
        )

    def _set_signature_columns_if_needed(self) -> None:
        """Transformers drops columns that are not listed here, even those that its samplers ask for later."""
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in self._extra_columns() if name not in self._signature_columns]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The seam for checks of a checkpoint: only here is the path of the last one known."""
        require_resumable(self.model, Path(resume_from_checkpoint), has_optimizer=not is_sharded(self))
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """Transformers looks for the adapter in the checkpoint itself, where PEFT only saves one called "default"."""
        folder = Path(cast(str, self.state.best_model_checkpoint))
        names = [name for name in cast(Any, self.model).peft_config if (folder / name / CONFIG_NAME).is_file()]
        if not names or is_sharded(self):
            super()._load_best_model()
            return
        for name in names:
            weights = load_peft_weights(str(folder / name), device="cpu")
            set_peft_model_state_dict(self.model, weights, adapter_name=name)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The seam for the card: called by each process that writes a model, for checkpoints too."""
        super()._save(output_dir, state_dict)
        self._save_card(Path(output_dir or cast(str, self.args.output_dir)))

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """The seam for gradients in units of activations: callbacks only run after clipping."""
        with self._clipping():
            return super()._clip_grad_norm(model)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """As transformers', with all metrics in the result under its prefix, and the loss as the mean over pairs.

        TRL keeps metrics until something is logged, which `predict` never does, and always calls them `eval_`.
        """
        before, self._metrics["eval"] = self._metrics["eval"], defaultdict(list)
        try:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            metrics = {name: sum(values) / len(values) for name, values in self._metrics["eval"].items()}
        finally:
            self._metrics["eval"] = before
        if "loss/plus" in metrics:
            metrics["loss"] = (metrics["loss/plus"] + metrics["loss/minus"]) / 2
        cast(dict[str, float], output.metrics).update(
            {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        )
        return output

    # What the subclass calls.

    def _model_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What TRL calls a model with to score the answers of a batch."""
        others = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps", *self._extra_columns())
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        given = {name: value for name, value in inputs.items() if name not in others}
        return {**given, **router, "use_cache": False, "labels": labels, "fused_lm_head": True}

    def _collated(self, examples: list[Any]) -> dict[str, Any]:
        """A batch of examples of the training set, as the model's calls get it."""
        return cast(dict[str, Any], self._prepare_inputs(self.data_collator(examples)))

    def _answer_head(self, base: Any) -> AnswerHead:
        """The head that scores answers: TRL's, unless the first example's log-probabilities are not the model's.

        Under ZeRO-3, which does not allow other passes, it is TRL's.
        """
        held_out = self.eval_dataset
        dataset: Any = self.train_dataset or (next(iter(held_out.values())) if isinstance(held_out, dict) else held_out)
        if dataset is None or is_deepspeed_zero3_enabled():
            return AnswerHead(base)
        head = AnswerHead(base)
        # Before training, FSDP can leave all processes but the first without weights.
        if self.accelerator.is_main_process:
            inputs = self._model_inputs(self._collated(list(islice(dataset, 1))))
            device = device_of(base)
            inputs = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in inputs.items()}
            with evaluating(self.model), torch.no_grad():
                head = AnswerHead.of(base, self.model, {n: v for n, v in inputs.items() if n != "fused_lm_head"})
        is_fused = broadcast_object_list([head.is_fused])[0]
        if not is_fused:
            self.accelerator.print(
                f"TRL's fused head does not give the log-probabilities of {type(base).__name__}: the model's own runs, "
                "which keeps the logits of all answers' tokens in memory."
            )
        return AnswerHead(base, is_fused)

    def _trl_loss(self, scores: Any, inputs: dict[str, Any], rows: Tensor | None = None, logs: bool = False) -> Tensor:
        """TRL's loss of a batch that has been scored, with the reference in the batch.

        Args:
            scores: The output of TRL's fused head for the batch.
            inputs: The batch, with the reference log-probabilities of its answers.
            rows: Indices of the rows to use, those of the chosen answers first; None for all, as they are.
            logs: Whether TRL logs its metrics and counts the tokens.
        """
        if rows is not None:
            inputs = take_pairs(inputs, rows)
            taken = {name: value[rows.to(value.device)] if value.dim() else value for name, value in scores.items()}
            scores = SimpleNamespace(**taken)
        kept = self._metrics, self._total_train_tokens
        # TRL reads the reference from the batch only if it was precomputed.
        precomputed, self.precompute_ref_logps = self.precompute_ref_logps, True
        if not logs:
            self._metrics = {mode: defaultdict(list) for mode in self._metrics}
        try:
            return cast(Tensor, super()._compute_loss(lambda **_: scores, inputs, False))
        finally:
            self.precompute_ref_logps = precomputed
            if not logs:
                self._metrics, self._total_train_tokens = kept

    @contextmanager
    def _counting_tokens_once(self, passes: int) -> Generator[None]:
        """TRL counts the tokens of each pass over a batch."""
        before = self._total_train_tokens
        yield
        self._total_train_tokens = before + (self._total_train_tokens - before) // passes
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]

    def _log_value(self, name: str, value: float) -> None:
        """Logs a training metric that all processes agree on."""
        self._metrics["train"][name].append(value)

    def _log_each(self, name: str, values: Tensor, where: Tensor | None = None) -> None:
        """Logs a metric of pairs, `(pairs,)`; its mean over all of them, or those of a mask, is reported."""
        mode, device = "train" if self.model.training else "eval", self.accelerator.device
        gathered = cast(Tensor, self.accelerator.gather_for_metrics(values.detach().float().to(device)))
        if where is not None:
            # Filtered after gathering: processes can hold different numbers of pairs of a direction.
            gathered = gathered[cast(Tensor, self.accelerator.gather_for_metrics(where.to(device)))]
        if gathered.numel():
            self._metrics[mode][name].extend(gathered.tolist())

    def _unweighted_ref_log_probs(self, model: Callable[..., Any], inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """As `compute_ref_log_probs`, without the weighting by length of `ld_alpha`."""
        ld_alpha, self.ld_alpha = self.ld_alpha, None
        try:
            return cast(tuple[Tensor, Tensor], self.compute_ref_log_probs(model, inputs))
        finally:
            self.ld_alpha = ld_alpha

    def _replace_loss(self) -> None:
        """Leaves TRL a loss that it knows, to run for its metrics only.

        Raises:
            UnsupportedOperationError: The router's loss is part of TRL's.
        """
        if self.aux_loss_enabled:
            raise UnsupportedOperationError(
                "router_aux_loss_coef only works with TRL's losses: set it to 0, or use one of TRL's."
            )
        self.loss_types = ["sigmoid"]

    def _save_checkpoint_now(self) -> None:
        """Saves a checkpoint outside the schedule."""
        self._save_checkpoint(self.model, trial=None)

    def _require_cacheable(self) -> None:
        """Raises if the setup needs the lower layers, or calls the model in another way.

        Raises:
            UnsupportedOperationError: It does.
        """
        settings = {
            "FSDP": self.is_fsdp_enabled,
            "DeepSpeed": self.is_deepspeed_enabled,
            "a vision dataset": self._is_vision_dataset,
            "torch_compile": self.args.torch_compile,
            "a load-balancing loss (router_aux_loss_coef)": self.aux_loss_enabled,
            "a custom data_collator": not isinstance(self.data_collator, DataCollatorForPreference),
        }
        found = [name for name, is_set in settings.items() if is_set]
        if found:
            raise UnsupportedOperationError(f"cache_activations=True does not support {found[0]}: drop one of the two.")

    def _without_checkpointing(self) -> AbstractContextManager[None]:
        """Gradient checkpointing is off: what is computed without gradients needs none."""
        return disable_gradient_checkpointing(cast(Any, self.model), cast(Any, self.args.gradient_checkpointing_kwargs))


@contextmanager
def no_reference_adapter(model: Any) -> Generator[None]:
    """Keeps TRL from adding a frozen copy of the adapter as the reference, which is the unsteered model here.

    For a `PeftModel`, `DPOTrainer.__init__` reads `peft_config["default"]`, calls `add_adapter("ref", ...)`, and copies
    the parameters of "default" to those of "ref". All three have no effect within the context.
    """
    if not isinstance(model, PeftModel):
        yield
        return
    alias = "default" not in model.peft_config
    if alias:
        model.peft_config["default"] = model.peft_config[model.active_adapters[0]]
    model.__dict__["add_adapter"] = lambda *args, **kwargs: None
    model.__dict__["get_parameter"] = lambda name: nn.Module.get_parameter(model, name.replace(".ref.", ".default."))
    try:
        yield
    finally:
        del model.__dict__["add_adapter"], model.__dict__["get_parameter"]
        if alias:
            del model.peft_config["default"]
