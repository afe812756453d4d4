"""TRL's trainer, with metrics of single pairs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn
from trl import DPOTrainer


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

    @contextmanager
    def _given_reference(self) -> Generator[None]:
        """TRL reads the reference from the batch only if it thinks that it was precomputed."""
        precomputed, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            yield
        finally:
            self.precompute_ref_logps = precomputed

    @contextmanager
    def _metrics_kept(self, except_for: frozenset[str] = frozenset()) -> Generator[None]:
        """Keeps the metrics and the count of tokens as they are, except for some that may grow."""
        metrics, tokens = self._metrics, self._total_train_tokens
        self._metrics = {mode: defaultdict(list) for mode in metrics}
        try:
            yield
        finally:
            for mode, values in self._metrics.items():
                for name in values.keys() & except_for:
                    metrics[mode][name].extend(values[name])
            self._metrics, self._total_train_tokens = metrics, tokens

    def _log_each(self, name: str, values: Tensor, where: Tensor | None = None) -> None:
        """Logs a metric of single pairs; the mean over all of them, or those of a mask, is what is reported."""
        mode = "train" if self.model.training else "eval"
        gathered = cast(Tensor, self.accelerator.gather_for_metrics(values.detach().float()))
        if where is not None:
            # Gathered whole and then filtered: processes can hold different numbers of pairs of a direction.
            gathered = gathered[cast(Tensor, self.accelerator.gather_for_metrics(where))]
        if gathered.numel():
            self._metrics[mode][name].extend(gathered.tolist())
