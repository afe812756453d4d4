"""A bidirectional DPOTrainer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig
from torch import Tensor, nn
from transformers.trainer_utils import get_last_checkpoint

from .._utils import whole
from ..errors import ConfigError, NonFiniteLossError, UnsupportedOperationError
from ..scoring.cache import ActivationCache, CacheOptions
from ..scoring.scorer import Scorer, WholeModel
from ..scoring.store import COLUMNS, CollateWithRows
from ..tuner import steering
from ..tuner.adapters import steered_layers
from ..tuner.blocks import decoder_blocks
from ..tuner.hooks import require_single_hooks
from ._trl import TRLSeams, no_reference_adapter
from .checks import require_adapter
from .config import YaPOTrainingConfig
from .data import prepared_pairs, require_preferences
from .metrics import share_of_tokens_moved, size_of_codes
from .objective import (
    OBJECTIVES,
    Objective,
    OrientedPairs,
    draw_directions,
    loss_of_each,
    pair_order,
    preference_margin,
)
from .sparsity import Sparsify, require_sparsifiable
from .summary import training_card
from .units import Units, gradients_in_units, in_units, measure_units

_SIGN_NAMES = {1.0: "plus", -1.0: "minus"}


class YaPOTrainer(TRLSeams):
    """Trains codes on preference pairs, in directions that alternate between +1 and -1.

    It accepts the arguments of TRL's `DPOTrainer` except `ref_model`: the reference is the same model without steering.
    A pair with direction -1 is steered with multiplier -1 and enters TRL's loss with its answers swapped. Metrics refer
    to the pair as labelled: chosen means chosen in both directions.

    In addition to TRL's metrics it logs `loss/*` and `margin/*` (in nats) for the directions `plus` and `minus`, and
    `code/nonzero`, `code/norm` and `code/tokens_moved` (share of tokens with a feature that moved) of the codes.
    Evaluation uses fixed multipliers: `eval_loss` is the mean of both directions, TRL's metrics are those at +1, and
    `eval_accuracy/plus`, `/zero` and `/minus` are the shares of pairs whose chosen answer is more likely than the
    rejected one at +1, 0 and -1.

    Args:
        model: A model, or the name or path of one, together with `peft_config`; or a `PeftModel` with a YaPO adapter.
        args: The training config; the published defaults if None.
        peft_config: Config of the adapter to attach.
        objective: A custom loss instead of `args.loss_type`: a function from `OrientedPairs` to losses, `(pairs,)`.
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
        **kwargs: Any,
    ) -> None:
        if args is not None and not isinstance(args, YaPOTrainingConfig):
            raise ConfigError(f"args is a {type(args).__name__}: YaPOTrainer takes a YaPOTrainingConfig.")
        if kwargs.get("ref_model") is not None:
            raise UnsupportedOperationError(
                "ref_model is not supported: the reference is the same model without steering."
            )
        require_adapter(model, peft_config)
        if args is not None and args.gradient_checkpointing:
            require_single_hooks()
        require_preferences(train_dataset, "train_dataset")
        require_preferences(eval_dataset, "eval_dataset")
        self._checked = [train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset])]
        self._drawn_at, self._micro_batch = -1, 0
        with no_reference_adapter(model):
            super().__init__(
                model=cast(Any, model),
                args=args if args is not None else YaPOTrainingConfig(output_dir=_default_output_dir(model)),
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                peft_config=peft_config,
                **kwargs,
            )
        self._objective = self._chosen_objective(objective)
        self._layers = steered_layers(self.model)
        self._base_model: Any = cast(Any, self.model).get_base_model()
        for layer in self._layers:
            layer.track_moved = True
        if self.args.max_features is not None or self.args.l1:
            require_sparsifiable(self, self._layers)
            self.add_callback(Sparsify(self._layers))
        self._units: Units | None = None
        if self.args.learning_rate_unit == "activation" and self.optimizer is None:
            self._units = measure_units(self, self._base_model, self._layers)
        self._cache: ActivationCache | None = None
        if self.args.cache_activations:
            self._require_cacheable()
            self._cache = self._activation_cache()
            self.train_dataset, self.eval_dataset = self._cache.add_all(self.train_dataset, self.eval_dataset)
            self.data_collator = CollateWithRows(self.data_collator)
        else:
            self.accelerator.print(
                f"Every step runs all {len(decoder_blocks(self._base_model)[1])} layers, with and without steering. "
                f"With cache_activations=True, layers 0 to {self._layers[0].index} and the reference run only once."
            )

    def _activation_cache(self) -> ActivationCache:
        args = self.args
        options = CacheOptions(
            folder=args.activation_cache_dir,
            dtype=args.activation_cache_dtype,
            batch_size=args.precompute_ref_batch_size or args.per_device_train_batch_size,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
        )
        training_mode = self._without_checkpointing
        return ActivationCache(self.model, self._layers, self.accelerator, self.data_collator, training_mode, options)

    def _chosen_objective(self, own: Objective | None) -> Objective | None:
        """The loss if it is not one of TRL's."""
        chosen = own or OBJECTIVES.get(self.args.loss_type[0])
        if chosen is None:
            return None
        if own is not None and self.args.loss_type != ["sigmoid"]:
            raise ConfigError(f"objective= and loss_type={self.args.loss_type!r} are both given: keep one of them.")
        self.args.require_plain_loss()
        self._replace_loss()
        return chosen

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
        model: Any = self.accelerator.unwrap_model(self.model)
        chat = bool(getattr(self.processing_class, "chat_template", None))
        tags = ["trl", *([tags] if isinstance(tags, str) else tags or [])]
        card = training_card(model, self.args, self.state, tags, repo_id=self.hub_model_id, dataset=dataset, chat=chat)
        card.save(folder / "README.md")

    def _prepared(self, dataset: Any, name: str, args: Any, tokenize: Callable[[], Any]) -> Any:
        if not any(dataset is checked for checked in self._checked):
            require_preferences(dataset, name)
        return prepared_pairs(dataset, name, args, tokenize)

    def _extra_columns(self) -> list[str]:
        return [*COLUMNS, self.args.length_column_name]

    def _clipping(self) -> AbstractContextManager[None]:
        return gradients_in_units(self._layers, self._units or {})

    def _batch_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        pairs = len(inputs["input_ids"]) // 2
        directions = [torch.ones(pairs), -torch.ones(pairs)]
        if self.model.training and self.args.direction != "both":
            directions = [self._draw(pairs)]
        cached = None if self._cache is None else self._cache.pairs(model, inputs, directions[0])
        inputs = {name: value for name, value in inputs.items() if name not in COLUMNS}
        scorer: Scorer = cached or WholeModel(model, self._base_model)
        inputs = self._with_reference(scorer, inputs)
        return (self._training_loss if self.model.training else self._evaluation_loss)(scorer, inputs, directions)

    def _training_loss(self, scorer: Scorer, inputs: dict[str, Any], directions: list[Tensor]) -> Tensor:
        with self._counting_tokens_once(len(directions)):
            losses = [self._directed_loss(scorer, inputs, direction)[0] for direction in directions]
        loss = torch.stack(losses).mean()
        self._require_finite(loss)
        for name, value in size_of_codes(self._layers).items():
            self._log_value(name, value)
        return loss

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
        order = pair_order(directions)
        if self._objective is not None:
            losses = loss_of_each(self._objective, OrientedPairs.of(scores.log_probs, inputs, order))
        elif self.model.training:
            losses = self._trl_loss(scores, inputs, order)[None]
        else:
            # One pair at a time: a mean over them does not depend on how they were batched.
            losses = torch.stack([self._trl_loss(scores, inputs, rows) for rows in order.view(2, -1).T])
        chosen, rejected = scores.log_probs.detach().sum(dim=1).chunk(2)
        margin = preference_margin(chosen, rejected, inputs["ref_chosen_logps"], inputs["ref_rejected_logps"])
        for sign, name in _SIGN_NAMES.items():
            self._log_each(f"margin/{name}", margin, where=directions.to(margin.device) == sign)
        if self.args.direction != "example" or not self.model.training:
            self._log_each(f"loss/{_SIGN_NAMES[float(directions[0])]}", losses)
        return losses.mean(), (chosen, rejected)

    def _with_reference(self, scorer: Scorer, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch with the reference log-probabilities of its answers, or zeros without a reference."""
        if self.args.reference == "none":
            chosen = rejected = torch.zeros(len(inputs["input_ids"]) // 2, device=self.accelerator.device)
        elif "ref_chosen_logps" in inputs:
            return inputs
        else:
            chosen, rejected = self.compute_ref_log_probs(scorer.reference, inputs)
        return {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    def _draw(self, pairs: int) -> Tensor:
        step = self.state.global_step
        self._micro_batch = self._micro_batch + 1 if step == self._drawn_at else 0
        self._drawn_at = step
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        rank = self.accelerator.process_index
        return draw_directions(pairs, self.args.direction, seed, step, self._micro_batch, rank)

    def _require_finite(self, loss: Tensor) -> None:
        """Stops all processes before the optimizer spoils the codes, and saves them as they are."""
        losses = cast(Tensor, self.accelerator.gather(loss.detach()[None]))
        if losses.isfinite().all():
            return
        bad, step = losses[~losses.isfinite()][0].item(), self.state.global_step
        codes = [whole(code) for layer in self._layers for code in layer.yapo_code.values()]
        good = torch.stack([code.isfinite().all() for code in codes]).all().to(losses.device)
        if step > 0 and cast(Tensor, self.accelerator.gather(good[None])).all():
            self._save_checkpoint_now()
        output_dir = cast(str, self.args.output_dir)
        last = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
        kept = f"The codes before it are in {last!r}." if last else "There is no checkpoint from before it."
        raise NonFiniteLossError(
            f"The loss is {bad} in step {step + 1}. {kept} Lower learning_rate (now {self.args.learning_rate}) "
            "or train in float32 if the model overflows."
        )


def _default_output_dir(model: Any) -> str:
    name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "") or "model"
    return f"{name.rstrip('/').split('/')[-1]}-YaPO"
