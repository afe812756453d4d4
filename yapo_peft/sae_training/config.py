"""The settings of SAE training."""

from __future__ import annotations

from dataclasses import dataclass

from .._utils import at_least, choice, finite, listed
from ..errors import ConfigError

ARCHITECTURES = ("batchtopk", "matryoshka_batchtopk", "jumprelu", "topk")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class SAETrainingConfig:
    """Settings of `train_saes`.

    Attributes:
        layers: Layers to train an SAE on the output of, in one pass over the text; negative ones count from the end.
        architecture: "batchtopk", "matryoshka_batchtopk" (arXiv 2503.17547; its levels have 1/16, 1/4 and all of the
            features), "jumprelu" or "topk". Default: "batchtopk", or that of the SAE to start from. sae-lens saves the
            first two as JumpReLU SAEs.
        d_sae: Number of features. Default: 8 times the model's width, or that of the SAE to start from.
        l0: Active features per token: the mean over a batch, for "topk" the number. Default: 50, or that of the SAE to
            start from.
        tokens: Tokens to train on. If the text has fewer, it is used several times.
        batch_size: Tokens per training step.
        learning_rate: Learning rate of Adam. It warms up in the first twentieth of the steps, and falls to zero in
            the last quarter.
        context: Tokens per sequence. Longer texts are split.
        buffer: Tokens whose activations are shuffled together, at least 16 batches. They are in the model's device's
            memory, or with `store` in that of the CPU.
        forward_batch_size: Sequences per forward pass of the model.
        eval_split: Share of the text to hold out for evaluation.
        loss_tokens: Held-out tokens to measure the model's loss on; explained variance and L0 are measured on all.
        bf16: Whether to compute in mixed precision with bfloat16; weights of the SAEs stay in float32.
        dtype: dtype to save the SAEs in: "float32", "bfloat16" or "float16".
        store: Folder to store activations in, for text that is used several times: each token takes `2 * d_model`
            bytes per layer, or twice as much for a model in float32 without `bf16`. Default: not stored.
        save_steps: Steps between checkpoints, from which the same call resumes; 0 for none.
        report_to: "wandb" or "none".
        seed: Seed of the initial weights and of the order of the text.

    Raises:
        ConfigError: A value is invalid.
    """

    layers: int | list[int]
    architecture: str | None = None
    d_sae: int | None = None
    l0: float | None = None
    tokens: int = 4_000_000
    batch_size: int = 4096
    learning_rate: float = 3e-4
    context: int = 256
    buffer: int = 1 << 17
    forward_batch_size: int = 32
    eval_split: float = 0.05
    loss_tokens: int = 20_000
    bf16: bool = False
    dtype: str = "float32"
    store: str | None = None
    save_steps: int = 500
    report_to: str = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        layers = listed(self.layers)
        if not layers or not all(isinstance(each, int) and not isinstance(each, bool) for each in layers):
            raise ConfigError(f"layers={self.layers!r}: must be a whole number or a list of them, such as [12, 15].")
        choice((None, *ARCHITECTURES), architecture=self.architecture)
        choice(DTYPES, dtype=self.dtype)
        choice(("wandb", "none"), report_to=self.report_to)
        if self.d_sae is not None:
            at_least(16, d_sae=self.d_sae)
        at_least(1, batch_size=self.batch_size, forward_batch_size=self.forward_batch_size)
        at_least(1, loss_tokens=self.loss_tokens)
        at_least(4, context=self.context)
        at_least(0, save_steps=self.save_steps, seed=self.seed)
        if self.tokens < self.batch_size:
            raise ConfigError(f"tokens={self.tokens!r}: must be at least batch_size={self.batch_size}, one step.")
        if self.buffer < 16 * self.batch_size:
            raise ConfigError(f"buffer={self.buffer!r}: must be at least 16 batches, {16 * self.batch_size} tokens.")
        finite(learning_rate=self.learning_rate, eval_split=self.eval_split)
        if self.learning_rate <= 0:
            raise ConfigError(f"learning_rate={self.learning_rate!r}: must be positive.")
        if not 0 < self.eval_split <= 0.5:
            raise ConfigError(f"eval_split={self.eval_split!r}: must be positive, and at most 0.5.")
        if self.l0 is not None:
            finite(l0=self.l0)
            if self.l0 <= 0 or (self.d_sae is not None and self.l0 > self.d_sae):
                raise ConfigError(f"l0={self.l0!r}: must be positive, and not more than the features.")

    @property
    def steps(self) -> int:
        """Number of training steps."""
        return self.tokens // self.batch_size
