"""The trainer: TRL's DPOTrainer, made bidirectional."""

from __future__ import annotations

import textwrap
import warnings
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig
from torch import Tensor, nn
from transformers.trainer_utils import get_last_checkpoint
from trl.models.utils import disable_gradient_checkpointing

from ..adapter_file.codes import whole
from ..errors import ConfigError, NonFiniteLossError, UnsupportedOperationError
from ..scoring.cache import ActivationCache, CacheOptions
from ..scoring.scorer import Scorer, WholeModel
from ..scoring.store import COLUMNS, CollateWithRows
from ..tuner import steering
from ..tuner.adapters import steered_layers
from ..tuner.blocks import decoder_blocks
from ..tuner.layer import require_single_hooks
from .card import training_card
from .checks import no_reference_adapter, require_adapter, require_cacheable, require_same_adapters
from .code_metrics import share_of_tokens_moved, size_of_codes
from .config import YaPOTrainingConfig
from .data import require_preferences, require_room, require_shared, with_lengths
from .objective import (
    OBJECTIVES,
    Objective,
    OrientedPairs,
    draw_directions,
    loss_of_each,
    pair_order,
    preference_margin,
    take_pairs,
)
from .pair_metrics import PairMetricsTrainer
from .sparsity import Sparsify, require_sparsifiable
from .units import UnitsTrainer

_SIGN_NAMES = {1.0: "plus", -1.0: "minus"}


class YaPOTrainer(PairMetricsTrainer, UnitsTrainer):
    """Learns codes from preference pairs, with a direction that alternates between +1 and -1.

    It takes what TRL's `DPOTrainer` takes, except for a reference model: the reference is the same model unsteered.
    A pair that points to -1 is steered with multiplier -1 and enters TRL's loss with its answers swapped. All metrics
    are those of the pair as labelled: chosen means chosen, whichever way the steering points.

    Besides TRL's metrics it logs, for the direction `plus` or `minus`, `loss/*` and `margin/*` (in nats); of the codes,
    `code/nonzero`, `code/norm` and `code/tokens_moved` (share of tokens with a feature that moved). Evaluation uses
    fixed signs: `eval_loss` is the mean of both directions, TRL's metrics are those at +1, and `eval_accuracy/plus`,
    `/zero` and `/minus` are the shares of pairs whose chosen answer is the more likely one at +1, 0 and -1.

    Args:
        model: A model, or the name or path of one, together with `peft_config`; or a `PeftModel` with a YaPO adapter.
        args: The training config; published defaults if None.
        peft_config: The adapter to attach.
        objective: A loss of one's own, `(pairs,)`, of `OrientedPairs`, instead of `args.loss_type`.
        **kwargs: As for `DPOTrainer`: `train_dataset`, `eval_dataset`, `processing_class`, `callbacks`, ...

    Raises:
        ConfigError: There is no YaPO adapter to train.
        DatasetError: A dataset is empty, lacks columns, or leaves no room for answers.
        UnsupportedOperationError: A reference model is given.

    Source: arXiv 2601.08441, the bidirectional objective; arXiv 2406.00045.
    """

    _tag_names = ["trl", "yapo"]
    _name = "YaPO"
    _paper = {
        "title": "YaPO: Learnable Sparse Activation Steering Vectors for Domain Adaptation",
        "id": "2601.08441",
        "citation": textwrap.dedent("""\
            @misc{bounhar2026yapo,
                title         = {{YaPO: Learnable Sparse Activation Steering Vectors for Domain Adaptation}},
                author        = {Abdelaziz Bounhar and Rania Hossam Elmohamady Elbadry and Hadi Abdine and
                                 Preslav Nakov and Michalis Vazirgiannis and Guokan Shang},
                year          = 2026,
                eprint        = {arXiv:2601.08441},
            }"""),
    }
    args: YaPOTrainingConfig
    model: nn.Module

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
            raise UnsupportedOperationError("ref_model cannot be set: the reference is the same model, unsteered.")
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
        if self.args.learning_rate_unit == "activation" and self.optimizer is None:
            self.count_in_activations(self._base_model)
        self._cache: ActivationCache | None = None
        if self.args.cache_activations:
            require_cacheable(self)
            self._cache = self._activation_cache()
            self.train_dataset, self.eval_dataset = self._cache.add_all(self.train_dataset, self.eval_dataset)
            self.data_collator = CollateWithRows(self.data_collator)
        else:
            self._say_what_could_be_skipped()

    def _activation_cache(self) -> ActivationCache:
        args = self.args
        options = CacheOptions(
            folder=args.activation_cache_dir,
            dtype=args.activation_cache_dtype,
            batch_size=args.precompute_ref_batch_size or args.per_device_train_batch_size,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
        )
        checkpointing = args.gradient_checkpointing_kwargs
        training_mode = partial(disable_gradient_checkpointing, cast(Any, self.model), cast(Any, checkpointing))
        return ActivationCache(self.model, self._layers, self.accelerator, self.data_collator, training_mode, options)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        if not any(dataset is checked for checked in self._checked):
            require_preferences(dataset, dataset_name)
        if args.precompute_ref_log_probs and args.world_size > 1:
            require_shared(dataset, dataset_name)
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        warning = require_room(dataset, prepared, args.max_length, dataset_name)
        if warning is not None:
            warnings.warn(warning, UserWarning, stacklevel=2)
        return with_lengths(prepared, args)

    def _chosen_objective(self, own: Objective | None) -> Objective | None:
        """The loss that is not TRL's, if any; TRL's code then runs for its metrics alone."""
        name = self.loss_types[0] if self.loss_types[0] in OBJECTIVES else None
        if own is None and name is None:
            return None
        if own is not None and self.loss_types != ["sigmoid"]:
            raise ConfigError(f"objective= and loss_type={self.loss_types!r} are both given: keep one of them.")
        if self.aux_loss_enabled:
            raise UnsupportedOperationError("router_aux_loss_coef is part of TRL's losses alone: set it to 0.")
        self.args.require_plain_loss()
        self.loss_types = ["sigmoid"]
        return own if own is not None else OBJECTIVES[cast(str, name)]

    def _say_what_could_be_skipped(self) -> None:
        blocks = len(decoder_blocks(self._base_model)[1])
        self.accelerator.print(
            f"Every step runs through all {blocks} blocks, with and without steering. cache_activations=True computes "
            f"what lies below the output of block {self._layers[0].index}, and the reference, only once."
        )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        # transformers asks its samplers for lengths only after it has removed what is not named here.
        ours = (*COLUMNS, self.args.length_column_name)
        self._signature_columns += [name for name in ours if name not in self._signature_columns]

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Writes the adapter's card, with its training and the last evaluation, to `output_dir`.

        Args:
            model_name: Not used: the card is called as its repository is.
            dataset_name: Name of the preference dataset.
            tags: More tags.
        """
        if self.is_world_process_zero():
            training_card(self, dataset_name, tags).save(Path(cast(str, self.args.output_dir)) / "README.md")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        require_same_adapters(self.model, Path(resume_from_checkpoint))
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        training_card(self).save(Path(output_dir or cast(str, self.args.output_dir)) / "README.md")

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        pairs = len(inputs["input_ids"]) // 2
        directions = [torch.ones(pairs), -torch.ones(pairs)]
        if self.model.training and self.args.direction != "both":
            directions = [self._draw(pairs)]
        cached = None if self._cache is None else self._cache.pairs(model, inputs, directions[0])
        inputs = {name: value for name, value in inputs.items() if name not in COLUMNS}
        scorer: Scorer = cached or WholeModel(model, self._base_model)
        inputs = self._with_reference(scorer, inputs)
        loss = (self._training_loss if self.model.training else self._evaluation_loss)(scorer, inputs, directions)
        return (loss, self._logits_of(model, inputs)) if return_outputs else loss

    def _training_loss(self, scorer: Scorer, inputs: dict[str, Any], directions: list[Tensor]) -> Tensor:
        seen = self._total_train_tokens
        losses = [self._directed_loss(scorer, inputs, direction)[0] for direction in directions]
        # TRL counts the tokens of each pass; the batch is one, whichever ways it was steered.
        self._total_train_tokens = seen + (self._total_train_tokens - seen) // len(directions)
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        loss = torch.stack(losses).mean()
        self._require_finite(loss)
        for name, value in size_of_codes(self._layers).items():
            self._metrics["train"][name].append(value)
        return loss

    def _evaluation_loss(self, scorer: Scorer, inputs: dict[str, Any], both: list[Tensor]) -> Tensor:
        plus, at_plus = self._directed_loss(scorer, inputs, both[0])
        minus, at_minus = self._directed_loss(scorer, inputs, both[1], logs_shared=False)
        at_zero = self._unsteered_logps(scorer, inputs)
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
            log_probs = scores.log_probs[order.to(scores.log_probs.device)]
            losses = loss_of_each(self._objective, OrientedPairs.of(log_probs, take_pairs(inputs, order)))
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
        """The batch with the log-probabilities of its answers under the reference; zeros where there is none."""
        if "ref_chosen_logps" in inputs and self.args.reference == "unsteered":
            return inputs
        if self.args.reference == "none":
            chosen = rejected = torch.zeros(len(inputs["input_ids"]) // 2, device=self.accelerator.device)
        else:
            chosen, rejected = self.compute_ref_log_probs(scorer.reference, inputs)
        return {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    def _unsteered_logps(self, scorer: Scorer, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        if self.args.reference == "unsteered" and self.ld_alpha is None:
            return inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        ld_alpha, self.ld_alpha = self.ld_alpha, None
        try:
            return cast(tuple[Tensor, Tensor], self.compute_ref_log_probs(scorer.reference, inputs))
        finally:
            self.ld_alpha = ld_alpha

    def _draw(self, pairs: int) -> Tensor:
        step = self.state.global_step
        self._micro_batch = self._micro_batch + 1 if step == self._drawn_at else 0
        self._drawn_at = step
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        rank = self.accelerator.process_index
        return draw_directions(pairs, self.args.direction, seed, step, self._micro_batch, rank)

    def _require_finite(self, loss: Tensor) -> None:
        """Stops before the optimizer can spoil the codes, on all processes at once, and saves them as they are."""
        losses = cast(Tensor, self.accelerator.gather(loss.detach()[None]))
        if losses.isfinite().all():
            return
        bad = losses[~losses.isfinite()][0].item()
        step = self.state.global_step
        codes = [whole(code) for layer in self._layers for code in layer.yapo_code.values()]
        good = torch.stack([code.isfinite().all() for code in codes]).all().to(losses.device)
        if step > 0 and cast(Tensor, self.accelerator.gather(good[None])).all():
            self._save_checkpoint(self.model, trial=None)
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
