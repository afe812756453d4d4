"""The config of the trainer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from transformers.utils import is_torch_bf16_gpu_available
from trl import DPOConfig

from .._utils import at_least, choice, help_from_docstring
from ..errors import ConfigError, UnsupportedOperationError
from ..scoring.cache import CacheOptions
from ..scoring.calibration import require_bound
from .objective import OBJECTIVES

_ONE_SIDED = "it lowers the likelihood of both answers, so its two directions do not oppose each other"
_SORTED = "it sorts a batch, which must then have one direction: use direction='batch' or 'both'"
_RATIO = "it compares each answer to the reference, and reference='none' has none"
# Metrics that a good code lowers.
_FALLING = ("loss/plus", "loss/minus", "margin/minus", "accuracy/minus")
_RATIO_LOSSES = ("reps", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "aot_unpaired")
_TRL_DEFAULTS = {
    "loss_weights": None,
    "ld_alpha": None,
    "use_weighting": False,
    "label_smoothing": 0.0,
    "f_divergence_type": "reverse_kl",
}

# The paper's hyper-parameters, where the defaults differ.
PUBLISHED: dict[str, Any] = {
    "direction": "batch",
    "max_kl": None,
    "learning_rate_unit": "raw",
    "learning_rate": 5e-4,
    "adam_epsilon": 1e-8,
    "num_train_epochs": 20.0,
    "warmup_steps": 100,
}


@help_from_docstring
@dataclass
class YaPOTrainingConfig(DPOConfig):
    """TRL's `DPOConfig` with the options of YaPO's bidirectional loss, and defaults that were measured to work.

    `YaPOTrainingConfig.published(...)` has the paper's hyper-parameters. All other defaults are those of TRL and
    transformers: beta 0.1 and AdamW without weight decay, as published, and `max_length` 1024.

    Attributes:
        direction: How the direction `d` in {-1, +1} is drawn: once per "example", once per "batch", as published, or
            "both" in each step (twice the forward passes, and no noise from the draw).
        reference: Model that log-probabilities are compared to: the same model "unsteered", as published, or "none",
            which drops the reference terms and is a different objective.
        max_kl: Bound of the damage: KL(unsteered || steered) of the next token on neutral text, in nats per token, at
            multipliers +1 and -1. Codes of zero then start from an estimate of the best ones, unless they are sharded.
            None, as published, for no bound and a start at zero.
        cache_activations: Train and evaluate only the layers above the lowest steered one. Its output, its active
            features and the reference log-probabilities are computed once, stored on disk, and reused by later runs.
        activation_cache_dir: Folder for cached activations; one beside Hugging Face's caches by default.
        activation_cache_dtype: Dtype of cached activations: "float32", "bfloat16" or "float16"; the model's by default.
        max_features: Maximum number of non-zero entries of the trained codes, over all layers: those that gain most for
            their damage, chosen before the first step, half of them for each direction. As published there is no limit:
            every feature that was ever active gets one.
        loss_type: One or several of TRL's losses, or "reps" (RePS); "sigmoid", as published, by default.
        learning_rate_unit: "activation" scales the learning rate by the typical activation on the first examples (of an
            SAE the mean of a token's active features, of a dense vector the root mean square of a token; the median
            over tokens). "raw" takes it in units of the code, as published.
        learning_rate: Learning rate in units of `learning_rate_unit`. Published is 5e-4 with "raw", which suits some
            SAEs and hardly moves others.
        adam_epsilon: Epsilon of Adam, in the same units: entries whose gradients are small next to it take small steps.
            Published is 1e-8.
        num_train_epochs: Number of passes over the training set; published are 20.
        per_device_train_batch_size: Preference pairs per device and step, as published.
        lr_scheduler_type: Learning-rate schedule, as published.
        warmup_steps: Number of warmup steps, or their share of all steps if below 1; published are 100.
        router_aux_loss_coef: Weight of a mixture of experts' load-balancing loss: 0 by default, unlike in TRL, because
            the router is frozen.
        gradient_checkpointing: Older name of `activation_checkpointing`. Off by default, unlike in TRL: no gradient
            reaches the layers below the steered one, so it would save less than in other training.

    Raises:
        ConfigError: An option has an invalid value, or two options contradict each other.
        UnsupportedOperationError: A loss type or an option of TRL does not work with alternating directions.

    Source: arXiv 2601.08441 (objective and hyper-parameters); arXiv 2406.00045 (bidirectional objective).
    """

    direction: str = "example"
    reference: str = "unsteered"
    max_kl: float | None = 0.1
    cache_activations: bool = False
    activation_cache_dir: str | None = None
    activation_cache_dtype: str | None = None
    max_features: int | None = None
    learning_rate_unit: str = "activation"
    learning_rate: float = 3e-2
    adam_epsilon: float = 3e-2
    num_train_epochs: float = 3.0
    per_device_train_batch_size: int = 4
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.1
    router_aux_loss_coef: float | None = 0.0
    gradient_checkpointing: bool | None = None  # pyright: ignore[reportIncompatibleVariableOverride]

    def __post_init__(self) -> None:
        if self.bf16 is None and not self.fp16 and not is_torch_bf16_gpu_available():
            # TRL enables bf16 by default, which machines without it reject.
            self.bf16 = False
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith(_FALLING):
            # transformers assumes that every metric whose name does not end in "loss" should grow.
            self.greater_is_better = False
        super().__post_init__()
        choice(("batch", "example", "both"), direction=self.direction)
        choice(("unsteered", "none"), reference=self.reference)
        choice(("activation", "raw"), learning_rate_unit=self.learning_rate_unit)
        if not 0 <= self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate={self.learning_rate}: must be a finite number, and not negative.")
        if self.beta <= 0:
            raise ConfigError(f"beta={self.beta}: must be positive; at 0 the loss does not depend on the code.")
        for loss_type in self.loss_type:
            self._check_loss(loss_type)
        if set(self.loss_type) & set(OBJECTIVES):
            self.require_plain_loss()
        if self.max_kl is not None:
            require_bound(self.max_kl)
        self._check_cache()
        if self.max_features is not None:
            at_least(2, max_features=self.max_features)
        if self.reference == "none":
            self._check_without_reference()

    @classmethod
    def published(cls, **options: Any) -> YaPOTrainingConfig:
        """The paper's hyper-parameters, with other options as given.

        Source: arXiv 2601.08441, table of hyper-parameters.
        """
        return cls(**{**PUBLISHED, **options})

    def cache_options(self) -> CacheOptions:
        """How `cache_activations` computes and keeps activations."""
        return CacheOptions(
            folder=self.activation_cache_dir,
            dtype=self.activation_cache_dtype,
            batch_size=self.precompute_ref_batch_size or self.per_device_train_batch_size,
            max_length=self.max_length,
            truncation_mode=self.truncation_mode,
        )

    def _check_loss(self, loss_type: str) -> None:
        reason = None
        if loss_type == "apo_down":
            reason = _ONE_SIDED
        elif loss_type in ("aot", "aot_unpaired") and self.direction == "example":
            reason = _SORTED
        elif loss_type in _RATIO_LOSSES and self.reference == "none":
            reason = _RATIO
        if reason is not None:
            raise UnsupportedOperationError(f"loss_type={loss_type!r} cannot train a steering code: {reason}.")

    def require_plain_loss(self) -> None:
        """Raises if an option would change TRL's losses, when another loss is used.

        Raises:
            ConfigError: An option is set, or there are several losses.
        """
        for name, default in _TRL_DEFAULTS.items():
            if getattr(self, name) != default:
                raise ConfigError(f"{name}={getattr(self, name)!r} changes TRL's losses, and none of them is used.")
        if len(self.loss_type) > 1:
            raise ConfigError(f"loss_type={self.loss_type!r}: {sorted(OBJECTIVES)} cannot be combined with others.")

    def _check_cache(self) -> None:
        if self.activation_cache_dtype is not None:
            choice(("float32", "bfloat16", "float16"), activation_cache_dtype=self.activation_cache_dtype)
        for name in ("activation_cache_dir", "activation_cache_dtype"):
            if getattr(self, name) is not None and not self.cache_activations:
                raise ConfigError(f"{name}={getattr(self, name)!r} needs cache_activations=True.")
        if self.cache_activations and self.precompute_ref_log_probs:
            raise ConfigError("precompute_ref_log_probs=True is part of cache_activations=True: set only the latter.")

    def _check_without_reference(self) -> None:
        if self.precompute_ref_log_probs:
            raise ConfigError("precompute_ref_log_probs=True has nothing to compute with reference='none': drop it.")
        if self.f_divergence_type != "reverse_kl":
            raise ConfigError(
                f"f_divergence_type={self.f_divergence_type!r} is a distance to the reference, and reference='none' "
                "has none."
            )


def output_dir_of(model: Any) -> str:
    """The default `output_dir` of a model, or of its name or path."""
    name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "") or "model"
    return f"{name.rstrip('/').split('/')[-1]}-YaPO"
