"""A bidirectional DPOTrainer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig
from torch import Tensor, nn

from .._utils import whole
from ..scoring.cache import ActivationCache
from ..scoring.scorer import Scorer, WholeModel
from ..scoring.store import COLUMNS, CollateWithRows
from ..tuner import steering
from ..tuner.adapters import steered_layers
from ..tuner.blocks import decoder_blocks
from ..tuner.hooks import require_single_hooks
from ._trl import TRLSeams, no_reference_adapter
from .budget import TRAINING_TOKENS, DamageBudget, limit_damage, neutral_text
from .checks import is_sharded, non_finite_loss, require_adapter, require_arguments
from .config import YaPOTrainingConfig, output_dir_of
from .data import prepared_pairs, require_context, require_preferences
from .metrics import share_of_tokens_moved, size_of_codes
from .objective import (
    Draws,
    Objective,
    OrientedPairs,
    chosen_objective,
    loss_of_each,
    pair_order,
    preference_margin,
)
from .selection import StartOnFeatures, gradients_of_both
from .sparsity import KeepSupport, require_sparsifiable
from .summary import training_card
from .units import Units, gradients_in_units, in_units, measure_units, trained_codes

_SIGN_NAMES = {1.0: "plus", -1.0: "minus"}


class YaPOTrainer(TRLSeams):
    """Trains codes on preference pairs, in directions that alternate between +1 and -1.

    It accepts the arguments of TRL's `DPOTrainer` except `ref_model`: the reference is the same model without steering.
    A pair with direction -1 is steered with multiplier -1 and enters TRL's loss with its answers swapped. Metrics refer
    to the pair as labelled: chosen means chosen in both directions.

    In addition to TRL's metrics it logs `loss/*` and `margin/*` (in nats) for the directions `plus` and `minus`, and
    `code/nonzero`, `code/norm` and `code/tokens_moved` (share of tokens with a feature that moved) of the codes. With
    `max_kl` also `kl/*`, the divergence on neutral text in nats per token, `kl_weight/*`, its weight in the loss, and
    `loss/preference`, the loss without it.
    Evaluation uses fixed multipliers: `eval_loss` is the mean of both directions, TRL's metrics are those at +1, and
    `eval_accuracy/plus`, `/zero` and `/minus` are the shares of pairs whose chosen answer is more likely than the
    rejected one at +1, 0 and -1.

    Args:
        model: A model, or the name or path of one, together with `peft_config`; or a `PeftModel` with a YaPO adapter.
        args: The training config; its defaults if None.
        peft_config: Config of the adapter to attach.
        objective: A custom loss instead of `args.loss_type`: a function from `OrientedPairs` to losses, `(pairs,)`.
        neutral_dataset: Text for `max_kl` and `max_features`: strings, or rows with a column `text` or `messages`; the
            package's own if None: varied prose, chats, instructions, questions, code and text in ten languages.
        **kwargs: As for `DPOTrainer`: `train_dataset`, `eval_dataset`, `processing_class`, `callbacks`, ...

    Raises:
        ConfigError: There is no YaPO adapter to train.
        DatasetError: A dataset is empty, lacks columns, or has only prompts that fill `max_length`.
        UnsupportedOperationError: A reference model is given.

    Source: arXiv 2601.08441, the bidirectional objective; arXiv 2406.00045.
    """

    args: YaPOTrainingConfig

    def __init__(
        self,
        model: str | nn.Module,
        args: YaPOTrainingConfig | None = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        peft_config: PeftConfig | None = None,
        objective: Objective | None = None,
        neutral_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        require_arguments(args, **kwargs)
        require_adapter(model, peft_config)
        if args is not None and args.gradient_checkpointing:
            require_single_hooks()
        require_preferences(train_dataset, "train_dataset")
        require_preferences(eval_dataset, "eval_dataset")
        self._checked = [train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset])]
        with no_reference_adapter(model):
            super().__init__(
                model=cast(Any, model),
                args=args if args is not None else YaPOTrainingConfig(output_dir=output_dir_of(model)),
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                peft_config=peft_config,
                **kwargs,
            )
        self._base_model: Any = cast(Any, self.model).get_base_model()
        for name, dataset in (("train_dataset", self.train_dataset), ("eval_dataset", self.eval_dataset)):
            require_context(dataset, name, self.args, self._base_model)
        self._objective = chosen_objective(objective, self.args)
        if self._objective is not None:
            self._replace_loss()
        self._draws = Draws(self.args, self.accelerator.process_index)
        self._layers = steered_layers(self.model)
        for layer in self._layers:
            layer.track_moved = True
        self._units: Units | None = None
        if self.args.learning_rate_unit == "activation" and self.optimizer is None:
            self._units = measure_units(self, self._base_model, self._layers)
        if self.args.cache_activations:
            self._require_cacheable()
        self._head = self._answer_head(self._base_model)
        self._cache: ActivationCache | None = None
        if self.args.cache_activations:
            given = self.model, self._head, self._layers, self.accelerator, self.data_collator
            self._cache = ActivationCache(*given, self._without_checkpointing, self.args.cache_options())
            self.train_dataset, self.eval_dataset = self._cache.add_all(self.train_dataset, self.eval_dataset)
            self.data_collator = CollateWithRows(self.data_collator)
        else:
            self.accelerator.print(
                f"Every step runs all {len(decoder_blocks(self._base_model)[1])} layers, with and without steering. "
                f"With cache_activations=True, layers 0 to {self._layers[0].index} and the reference run only once."
            )
        if self.args.max_features is not None:
            require_sparsifiable(self, self._layers, self.args.max_features)
        self._text = neutral_text(self, self._layers, neutral_dataset, upper_only=self._cache is not None)
        text = None if self._text is None else self._text.cut(TRAINING_TOKENS)
        self._budget = DamageBudget(text, self.args.max_kl) if text and self.args.max_kl else None
        if text is not None and not is_sharded(self):
            self.add_callback(StartOnFeatures(self._layers, text, self.train_dataset, self._gradients_of_shifts))
        self.add_callback(KeepSupport(self._layers, self.args.max_features))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; with `max_kl`, scales codes at the end that exceed it, and records their damage.

        Codes that are not those of the last evaluation are evaluated again.
        """
        self._draws.restart()
        for _, name in trained_codes(self._layers):
            cast(Any, self.model).peft_config[name].forget_damage()
        output = super().train(*args, **kwargs)
        is_new = self.args.load_best_model_at_end and self.state.best_global_step != self.state.global_step
        if self._text is not None and self.args.max_kl is not None and not is_sharded(self):
            is_new |= limit_damage(self._layers, self._text, self.args.max_kl)
        if is_new and self.args.eval_strategy != "no":
            self.evaluate()
        return output

    def create_optimizer(self, model: Any = None) -> Any:
        """As transformers', with a learning rate for each code in units of its activations."""
        is_given = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if self._units is not None and not is_given:
            in_units(optimizer, self._layers, self._units)
        return optimizer

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Writes the adapter's card, with its training and the last evaluation, to `output_dir`.

        Args:
            model_name: Ignored: the card has the name of its repository.
            dataset_name: Name of the preference dataset.
            tags: More tags.
        """
        if self.is_world_process_zero():
            self._save_card(Path(cast(str, self.args.output_dir)), dataset_name, tags)

    def _save_card(self, folder: Path, dataset: str | None = None, tags: str | list[str] | None = None) -> None:
        tags = ["trl", *([tags] if isinstance(tags, str) else tags or [])]
        training_card(self, tags, dataset).save(folder / "README.md")

    def _prepared(self, dataset: Any, name: str, args: Any, tokenize: Callable[[], Any]) -> Any:
        if not any(dataset is checked for checked in self._checked):
            require_preferences(dataset, name)
        prepared = prepared_pairs(dataset, name, args, tokenize)
        require_context(prepared, f"the {name} dataset", args, vars(self).get("_base_model"))
        return prepared

    def _extra_columns(self) -> list[str]:
        return [*COLUMNS, self.args.length_column_name]

    def _clipping(self) -> AbstractContextManager[None]:
        return gradients_in_units(self._layers, self._units or {})

    def _batch_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        pairs = len(inputs["input_ids"]) // 2
        directions = [torch.ones(pairs), -torch.ones(pairs)]
        if self.model.training:
            directions = self._draws.next(pairs, self.state.global_step)
        scorer = self._scorer(model, inputs, directions[0])
        inputs = self._with_reference(scorer, {n: value for n, value in inputs.items() if n not in COLUMNS})
        if not self.model.training:
            return self._evaluation_loss(scorer, inputs, directions)
        loss = self._training_loss(scorer, inputs, directions)
        if self._budget is not None:
            kept = cast(dict[str, Any], self.state.stateful_callbacks)
            penalty, metrics = self._budget.penalty(model, self._draws.batch, kept, self.accelerator)
            self._log_each("loss/preference", loss[None])
            loss = loss + penalty
            for name, value in metrics.items():
                self._log_value(name, value)
        self._require_finite(loss)
        return loss

    def _training_loss(self, scorer: Scorer, inputs: dict[str, Any], directions: list[Tensor]) -> Tensor:
        with self._counting_tokens_once(len(directions)):
            losses = [self._directed_loss(scorer, inputs, direction)[0] for direction in directions]
        for name, value in size_of_codes(self._layers).items():
            self._log_value(name, value)
        return torch.stack(losses).mean()

    def _evaluation_loss(self, scorer: Scorer, inputs: dict[str, Any], both: list[Tensor]) -> Tensor:
        plus, at_plus = self._directed_loss(scorer, inputs, both[0])
        minus, at_minus = self._directed_loss(scorer, inputs, both[1], logs_shared=False)
        if self.args.reference == "unsteered" and self.args.ld_alpha is None:
            at_zero = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            at_zero = self._unweighted_ref_log_probs(scorer.reference, inputs)
        for name, (chosen, rejected) in (("plus", at_plus), ("zero", at_zero), ("minus", at_minus)):
            self._log_each(f"accuracy/{name}", (chosen > rejected).float())
        return (plus + minus) / 2

    def _directed_loss(
        self, scorer: Scorer, inputs: dict[str, Any], directions: Tensor, logs_shared: bool = True
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The loss of a forward pass with each pair steered in its direction, and the log-probabilities of its answers.

        TRL's code runs on the scores of that pass as labelled, for its metrics, and as oriented, for the loss. Metrics
        that don't name a direction are logged if `logs_shared`.
        """
        uniform = bool((directions == directions[0]).all())
        unwrapped: Any = self.accelerator.unwrap_model(self.model)
        with steering(unwrapped, float(directions[0]) if uniform else scorer.multiplier_of_rows(directions)):
            scores = scorer(**self._model_inputs(inputs))
        if logs_shared:
            with torch.no_grad():
                self._trl_loss(scores, inputs, logs=True)
            seen = [layer.moved_tokens for layer in self._layers if layer.moved_tokens is not None]
            moved = share_of_tokens_moved([scorer.collated(tokens) for tokens in seen], inputs["attention_mask"])
            self._log_each("code/tokens_moved", moved)
        losses = self._losses(scores, inputs, pair_order(directions))
        chosen, rejected = scores.log_probs.detach().sum(dim=1).chunk(2)
        if self.args.ld_alpha is None:  # by which the reference is weighted
            margin = preference_margin(chosen, rejected, inputs["ref_chosen_logps"], inputs["ref_rejected_logps"])
            for sign, name in _SIGN_NAMES.items():
                self._log_each(f"margin/{name}", margin, where=directions.to(margin.device) == sign)
        if self.args.direction != "example" or not self.model.training:
            self._log_each(f"loss/{_SIGN_NAMES[float(directions[0])]}", losses)
        return losses.mean(), (chosen, rejected)

    def _losses(self, scores: Any, inputs: dict[str, Any], order: Tensor) -> Tensor:
        """The losses of scored pairs in an order of their rows: in training possibly only their mean."""
        if self._objective is not None:
            return loss_of_each(self._objective, OrientedPairs.of(scores.log_probs, inputs, order))
        if self.model.training:
            return self._trl_loss(scores, inputs, order)[None]
        # One pair at a time: a mean over them does not depend on how they were batched.
        return torch.stack([self._trl_loss(scores, inputs, rows) for rows in order.view(2, -1).T])

    def _gradients_of_shifts(self, examples: list[Any], shifts: list[Tensor], shifted: Any) -> list[Tensor]:
        """Gradients, `(d,)`, of the losses at +1 and -1 of examples that only the context steers, by its shifts."""
        inputs = self._collated(examples)
        plus = torch.ones(len(examples))
        scorer = self._scorer(self.model, inputs, plus)
        inputs = self._with_reference(scorer, {n: v for n, v in inputs.items() if n not in COLUMNS})
        with steering(cast(nn.Module, self.accelerator.unwrap_model(self.model)), 0.0), shifted:
            scores = scorer(**self._model_inputs(inputs))
        losses = [self._losses(scores, inputs, pair_order(sign * plus)).mean() for sign in _SIGN_NAMES]
        return gradients_of_both(losses, scores.log_probs, shifts)

    def _scorer(self, model: nn.Module, inputs: dict[str, Any], directions: Tensor) -> Scorer:
        cached = None if self._cache is None else self._cache.pairs(model, inputs, directions)
        return cached or WholeModel(model, self._head)

    def _with_reference(self, scorer: Scorer, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch with the reference log-probabilities of its answers, or zeros without a reference."""
        if self.args.reference == "none":
            chosen = rejected = torch.zeros(len(inputs["input_ids"]) // 2, device=self.accelerator.device)
        elif "ref_chosen_logps" in inputs:
            return inputs
        else:
            chosen, rejected = self.compute_ref_log_probs(scorer.reference, inputs)
        return {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    def _require_finite(self, loss: Tensor) -> None:
        """Stops all processes before the optimizer spoils the codes, and saves them as they are."""
        losses = cast(Tensor, self.accelerator.gather(loss.detach()[None]))
        if losses.isfinite().all():
            return
        codes = [whole(code) for layer in self._layers for code in layer.yapo_code.values()]
        good = torch.stack([code.isfinite().all().cpu() for code in codes]).all().to(losses.device)
        if self.state.global_step > 0 and cast(Tensor, self.accelerator.gather(good[None])).all():
            self._save_checkpoint_now()
        raise non_finite_loss(float(losses[~losses.isfinite()][0]), self.state, self.args)
