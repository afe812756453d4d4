"""The config of the trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from transformers.utils import is_torch_bf16_gpu_available
from trl import DPOConfig

from ..errors import ConfigError, UnsupportedOperationError
from .objective import OBJECTIVES

Direction = Literal["batch", "example", "both"]
Reference = Literal["unsteered", "none"]
LearningRateUnit = Literal["activation", "raw"]

_ONE_SIDED = {
    "apo_down": "it lowers the likelihood of both answers, so its two directions do not oppose each other",
}
_SORTED = {
    "aot": "it sorts a batch, which must then point in one direction: use direction='batch' or 'both'",
    "aot_unpaired": "it sorts a batch, which must then point in one direction: use direction='batch' or 'both'",
}
_CACHE_DTYPES = ("float32", "bfloat16", "float16")
# Metrics that a good code lowers.
_FALLING = ("loss/plus", "loss/minus", "margin/minus", "accuracy/minus")
_ABSOLUTE = ("reps", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "aot_unpaired")


@dataclass
class YaPOTrainingConfig(DPOConfig):
    """TRL's `DPOConfig` with the published defaults of YaPO and the choices of its bidirectional loss.

    Where nothing is said here, TRL's and transformers' defaults hold: beta 0.1 and AdamW without weight decay, as
    published, and `max_length` 1024.

    Attributes:
        direction: How the direction `d` in {-1, +1} is drawn: one per "batch" as published, one per "example", or
            "both" in each step (twice the forward passes, and no noise from the draw).
        reference: What log-probabilities are compared to: the same model "unsteered", as published, or "none", which
            leaves the reference out and is another objective.
        cache_activations: Train and evaluate on the blocks above the lowest steered one alone. What it and those below
            put out, its features and the reference are computed once, kept on disk, and used again by later runs.
        activation_cache_dir: Where; a folder beside Hugging Face's caches if None.
        activation_cache_dtype: "float32", "bfloat16" or "float16"; as the model computes if None.
        max_features: How many entries the codes may have at the end, all layers together. Not as published, where every
            feature that was ever on gets one.
        sparsify_start: Share of the training's steps from which on the number of entries falls, by the same factor in
            each step.
        sparsify_end: Share of its steps after which there are `max_features` at most.
        l1: Pull of each entry towards zero, in units of the loss (nats) per unit of the code: after each step entries
            shrink by the learning rate times this.
        loss_type: TRL's, or "reps", the loss of RePS; "sigmoid", as published, unless given.
        learning_rate_unit: "activation" counts the learning rate in typical activations, measured on the first
            examples: of an SAE the mean of a token's active features, of a dense vector the root mean square of a
            token, and of that the median over tokens. "raw" counts it in units of the code, as published.
        learning_rate: In that unit. Published are 5e-4 with "raw", which suits some SAEs and hardly moves others.
        num_train_epochs: As published.
        per_device_train_batch_size: As published.
        lr_scheduler_type: As published.
        warmup_steps: As published.
        gradient_checkpointing: Older name of `activation_checkpointing`, which is off unless set, unlike in TRL: no
            gradient reaches the blocks below the steered one, so there is less to save than in other training.

    Raises:
        ConfigError: A choice is unknown, or two of them contradict each other.
        UnsupportedOperationError: A loss type or an option of TRL makes no sense when the direction alternates.

    Source: arXiv 2601.08441 (objective and hyper-parameters); arXiv 2406.00045 (bidirectional objective).
    """

    direction: str = field(
        default="batch", metadata={"help": "Draw the steering direction per 'batch', per 'example', or use 'both'."}
    )
    reference: str = field(
        default="unsteered", metadata={"help": "Compare log-probabilities to the model 'unsteered', or to 'none'."}
    )
    cache_activations: bool = field(
        default=False, metadata={"help": "Compute what does not depend on the code once, and keep it on disk."}
    )
    activation_cache_dir: str | None = field(default=None, metadata={"help": "Where cached activations are kept."})
    activation_cache_dtype: str | None = field(
        default=None, metadata={"help": "Keep activations in 'float32', 'bfloat16' or 'float16'."}
    )
    max_features: int | None = field(default=None, metadata={"help": "Entries that codes may have at the end."})
    sparsify_start: float = field(default=0.2, metadata={"help": "Share of the steps before entries are removed."})
    sparsify_end: float = field(default=0.8, metadata={"help": "Share of the steps when max_features is reached."})
    l1: float = field(default=0.0, metadata={"help": "Pull of each entry towards zero, in nats per unit."})
    learning_rate_unit: str = field(
        default="activation", metadata={"help": "'activation': per typical activation. 'raw': per unit, as published."}
    )
    learning_rate: float = field(default=1e-2, metadata={"help": "Learning rate, in learning_rate_unit."})
    num_train_epochs: float = field(default=20.0, metadata={"help": "Number of passes over the training set."})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Pairs per device and step."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float = field(default=100, metadata={"help": "Steps over which the learning rate rises."})
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Older name of activation_checkpointing, which is off unless set."}
    )

    def __post_init__(self) -> None:
        if self.bf16 is None and not self.fp16 and not is_torch_bf16_gpu_available():
            # TRL turns bf16 on unless told not to, and then refuses machines without it.
            self.bf16 = False
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith(_FALLING):
            # transformers takes every metric that does not end in "loss" for one that should grow.
            self.greater_is_better = False
        super().__post_init__()
        if self.beta <= 0:
            raise ConfigError(f"beta={self.beta}: give a positive number; at 0 the loss does not depend on the code.")
        if self.direction not in get_args(Direction):
            raise ConfigError(f"direction={self.direction!r}: choose one of {get_args(Direction)}.")
        if self.learning_rate_unit not in get_args(LearningRateUnit):
            raise ConfigError(
                f"learning_rate_unit={self.learning_rate_unit!r}: choose one of {get_args(LearningRateUnit)}."
            )
        if self.reference not in get_args(Reference):
            raise ConfigError(f"reference={self.reference!r}: choose one of {get_args(Reference)}.")
        for loss_type in self.loss_type:
            self._check_loss(loss_type)
        if set(self.loss_type) & set(OBJECTIVES):
            self.require_plain_loss()
        self._check_cache()
        self._check_sparsity()
        if self.sync_ref_model:
            raise UnsupportedOperationError(
                "sync_ref_model=True moves the reference during training; here the reference is the model unsteered."
            )
        if self.reference == "none":
            self._check_without_reference()

    def _check_loss(self, loss_type: str) -> None:
        reason = _ONE_SIDED.get(loss_type)
        if reason is None and self.direction == "example":
            reason = _SORTED.get(loss_type)
        if reason is None and self.reference == "none" and loss_type in _ABSOLUTE:
            reason = "it judges each answer by its own ratio to the reference, and reference='none' has none"
        if reason is not None:
            raise UnsupportedOperationError(f"loss_type={loss_type!r} cannot train a steering code: {reason}.")

    def require_plain_loss(self) -> None:
        """Raises where an option changes TRL's losses, which are not the ones to train with.

        Raises:
            ConfigError: One of them is set, or there are several losses.
        """
        defaults = {
            "loss_weights": None,
            "ld_alpha": None,
            "use_weighting": False,
            "label_smoothing": 0.0,
            "f_divergence_type": "reverse_kl",
        }
        found = [name for name, default in defaults.items() if getattr(self, name) != default]
        if found:
            raise ConfigError(f"{found[0]}={getattr(self, found[0])!r} changes TRL's losses, and none of them is used.")
        if len(self.loss_type) > 1:
            raise ConfigError(f"loss_type={self.loss_type!r}: {sorted(OBJECTIVES)} stand alone, without others.")

    def _check_cache(self) -> None:
        if self.activation_cache_dtype not in (None, *_CACHE_DTYPES):
            raise ConfigError(
                f"activation_cache_dtype={self.activation_cache_dtype!r}: choose one of {', '.join(_CACHE_DTYPES)}."
            )
        for name in ("activation_cache_dir", "activation_cache_dtype"):
            if getattr(self, name) is not None and not self.cache_activations:
                raise ConfigError(f"{name}={getattr(self, name)!r} needs cache_activations=True.")
        if self.cache_activations and self.precompute_ref_log_probs:
            raise ConfigError(
                "precompute_ref_log_probs=True is part of cache_activations=True: leave it out, or TRL does it again."
            )

    def _check_sparsity(self) -> None:
        if self.max_features is not None and self.max_features < 1:
            raise ConfigError(f"max_features={self.max_features}: give a positive number, or None for no limit.")
        if not 0 <= self.sparsify_start < self.sparsify_end <= 1:
            raise ConfigError(
                f"sparsify_start={self.sparsify_start}, sparsify_end={self.sparsify_end}: give shares of the training, "
                "0 <= start < end <= 1."
            )
        if not 0 <= self.l1 < float("inf"):
            raise ConfigError(f"l1={self.l1}: give a number of 0 or more.")

    def _check_without_reference(self) -> None:
        if self.precompute_ref_log_probs:
            raise ConfigError(
                "precompute_ref_log_probs=True has nothing to compute with reference='none': leave it out."
            )
        if self.f_divergence_type != "reverse_kl":
            raise ConfigError(
                f"f_divergence_type={self.f_divergence_type!r} measures the distance to a reference; reference='none' "
                "has none."
            )
