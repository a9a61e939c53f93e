"""Which optimizers a model is trained with: their settings and the named presets, read without torch.

The paper (arXiv 2510.26104, section 4.1) uses Adagrad for tables and RMSPropV2
for dense parameters; AdamW is offered for the small sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from onetrans.errors import BadConfigError

DenseOptimizer = Literal["adamw", "rmsprop_v2"]


@dataclass(frozen=True)
class OptimizerConfig:
    """How a model is trained, tables and dense parameters apart."""

    dense: DenseOptimizer
    """Optimizer of dense parameters."""
    dense_lr: float
    """Its learning rate."""
    dense_clip: float
    """Largest global norm of all dense gradients together."""
    warmup_steps: int = 0
    """Steps over which the dense learning rate rises linearly from nothing."""
    rms_alpha: float = 0.99999
    """RMSPropV2: what is kept of the sum of squares at each step."""
    rms_eps: float = 1e-6
    """RMSPropV2: added to the root of that sum."""
    weight_decay: float = 0.0
    """AdamW: decoupled weight decay of matrices; vectors are never decayed."""
    embedding_lr: float = 0.1
    """Adagrad: learning rate of the tables."""
    embedding_accumulator: float = 1.0
    """Adagrad: what the sum of squares starts from."""
    embedding_clip: float = 120.0
    """Largest global norm of all table gradients together."""

    def __post_init__(self) -> None:
        if self.dense not in get_args(DenseOptimizer):
            raise BadConfigError(f"optimizer.dense = {self.dense!r} is none of {', '.join(get_args(DenseOptimizer))}")
        for name in ("dense_lr", "dense_clip", "embedding_lr", "embedding_clip", "rms_eps"):
            if not getattr(self, name) > 0:
                raise BadConfigError(f"optimizer.{name} = {getattr(self, name)} must be above 0")
        for name in ("warmup_steps", "weight_decay", "embedding_accumulator"):
            if getattr(self, name) < 0:
                raise BadConfigError(f"optimizer.{name} = {getattr(self, name)} must not be negative")
        if not 0 < self.rms_alpha <= 1:
            raise BadConfigError(f"optimizer.rms_alpha = {self.rms_alpha} must be above 0 and at most 1")
        if self.weight_decay and self.dense != "adamw":
            raise BadConfigError(f"optimizer.weight_decay = {self.weight_decay} needs dense = 'adamw'")


def paper_optimizers() -> OptimizerConfig:
    """The paper's setting, for the base and large sizes."""
    return OptimizerConfig(dense="rmsprop_v2", dense_lr=0.005, dense_clip=90.0)


def small_optimizers() -> OptimizerConfig:
    """For tiny and small models on logs of up to millions of rows, where a run has hundreds of steps, not millions.

    The loss is a mean over a batch, so a row's gradient is of the order of 1e-4: beside the paper's initial
    accumulator it would move nothing for thousands of steps.  From (almost) zero, a row's first step is its full
    learning rate, which is the size of its initial values.
    """
    return OptimizerConfig(
        dense="adamw",
        dense_lr=0.002,
        dense_clip=10.0,
        warmup_steps=50,
        embedding_lr=0.05,
        embedding_accumulator=1e-8,
    )


_PRESETS: dict[str, Callable[[], OptimizerConfig]] = {
    "tiny": small_optimizers,
    "small": small_optimizers,
    "base": paper_optimizers,
    "large": paper_optimizers,
}


def optimizer_preset(preset_name: str) -> OptimizerConfig:
    """Return the optimizers that go with a named model size.

    Raises:
        BadConfigError: if there is no such size.
    """
    if preset_name not in _PRESETS:
        raise BadConfigError(f"there are no optimizers for preset {preset_name!r}; presets are {', '.join(_PRESETS)}")
    return _PRESETS[preset_name]()
