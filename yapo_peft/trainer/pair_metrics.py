"""TRL's trainer, with metrics of single pairs."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from trl import DPOTrainer

from .objective import take_pairs


class PairMetricsTrainer(DPOTrainer):
    """A `DPOTrainer` whose loss can run several times on a batch, and which reports means over pairs."""

    model: nn.Module

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """As transformers', with all metrics in the result under its prefix, and the loss as the mean over pairs.

        TRL keeps metrics until something is logged, which `predict` never does, and calls them `eval_` always.
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

    def _model_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What TRL calls a model with to score the answers of a batch."""
        others = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        given = {name: value for name, value in inputs.items() if name not in others}
        return {**given, **router, "use_cache": False, "labels": labels, "fused_lm_head": True}

    def _logits_of(self, model: Any, inputs: dict[str, Any]) -> Any:
        """The model's output for a batch as labelled, whose logits TRL hands to `compute_metrics`."""
        given = self._model_inputs(inputs)
        del given["labels"], given["fused_lm_head"]
        with torch.no_grad():
            return model(**given)

    def _trl_loss(self, scores: Any, inputs: dict[str, Any], rows: Tensor | None = None, logs: bool = False) -> Tensor:
        """TRL's loss of a batch that is scored already, with its reference.

        Args:
            scores: What TRL's fused head gives for the batch.
            inputs: The batch, with the log-probabilities of its answers under the reference.
            rows: Indices of the rows that enter, those of the chosen answers first; all, as they are, if None.
            logs: Whether TRL's metrics of it, and its tokens, count.
        """
        if rows is not None:
            inputs = take_pairs(inputs, rows)
            taken = {name: value[rows.to(value.device)] if value.dim() else value for name, value in scores.items()}
            scores = SimpleNamespace(**taken)
        kept = self._metrics, self._total_train_tokens
        # TRL reads the reference from the batch only if it thinks that it was precomputed.
        precomputed, self.precompute_ref_logps = self.precompute_ref_logps, True
        if not logs:
            self._metrics = {mode: defaultdict(list) for mode in self._metrics}
        try:
            return cast(Tensor, super()._compute_loss(lambda **_: scores, inputs, False))
        finally:
            self.precompute_ref_logps = precomputed
            if not logs:
                self._metrics, self._total_train_tokens = kept

    def _log_each(self, name: str, values: Tensor, where: Tensor | None = None) -> None:
        """Logs a metric of single pairs; the mean over all of them, or those of a mask, is what is reported."""
        mode = "train" if self.model.training else "eval"
        gathered = cast(Tensor, self.accelerator.gather_for_metrics(values.detach().float()))
        if where is not None:
            # Gathered whole and then filtered: processes can hold different numbers of pairs of a direction.
            gathered = gathered[cast(Tensor, self.accelerator.gather_for_metrics(where))]
        if gathered.numel():
            self._metrics[mode][name].extend(gathered.tolist())
