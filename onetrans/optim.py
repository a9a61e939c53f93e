"""Optimizers: one for the embedding tables, one for everything else, each with its own gradient clip.

The paper (arXiv 2510.26104, section 4.1) uses Adagrad for tables and RMSPropV2
for dense parameters; AdamW is offered for the small sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args, overload

import torch
from torch import Tensor, nn

from onetrans.errors import BadConfigError
from onetrans.models import RankingModel

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
    """For tiny and small models on logs of millions of rows, where a run has hundreds of steps, not millions."""
    return OptimizerConfig(dense="adamw", dense_lr=0.002, dense_clip=10.0, warmup_steps=50, embedding_accumulator=0.1)


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


class RMSPropV2(torch.optim.Optimizer):
    """The optimizer of bytedance/monolith: ``v <- alpha v + g^2``, ``w <- w - lr g / (sqrt(v) + eps)``.

    Unlike :class:`torch.optim.RMSprop` the new square is not scaled by ``1 - alpha``: with alpha near 1 the sum
    grows as Adagrad's does, and the first step moves each weight by ``lr``, not by ``lr / sqrt(1 - alpha)``.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float = 0.005, alpha: float = 0.99999, eps: float = 1e-6
    ) -> None:
        super().__init__(params, {"lr": lr, "alpha": alpha, "eps": eps})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            gradients: list[Tensor] = [p.grad for p in parameters]
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["square_sum"] = torch.zeros_like(parameter)
            sums: list[Tensor] = [self.state[p]["square_sum"] for p in parameters]
            torch._foreach_mul_(sums, group["alpha"])
            torch._foreach_addcmul_(sums, gradients, gradients)
            roots = torch._foreach_sqrt(sums)
            torch._foreach_add_(roots, group["eps"])
            torch._foreach_addcdiv_(parameters, gradients, roots, value=-group["lr"])
        return loss


class GradientNorms(NamedTuple):
    """Global norms before clipping."""

    dense: float
    embedding: float


class Optimizers:
    """The two optimizers of a model, stepped, saved and restored as one."""

    def __init__(self, model: RankingModel, config: OptimizerConfig) -> None:
        self.config = config
        self.steps = 0
        # Adagrad builds sparse tensors from coalesced gradients; torch warns until someone says that is trusted.
        torch.sparse.check_sparse_tensor_invariants.disable()
        self._tables = list(model.embedding_parameters().values())
        self._dense = list(model.dense_parameters().values())
        self.embedding = torch.optim.Adagrad(
            self._tables, lr=config.embedding_lr, initial_accumulator_value=config.embedding_accumulator
        )
        self.dense: torch.optim.Optimizer
        if config.dense == "rmsprop_v2":
            self.dense = RMSPropV2(self._dense, lr=config.dense_lr, alpha=config.rms_alpha, eps=config.rms_eps)
        else:
            matrices = [p for p in self._dense if p.ndim > 1]
            vectors = [p for p in self._dense if p.ndim <= 1]
            groups = [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ]
            self.dense = torch.optim.AdamW(groups, lr=config.dense_lr)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        self.embedding.zero_grad(set_to_none=True)
        self.dense.zero_grad(set_to_none=True)

    def step(self) -> GradientNorms:
        """Clip both sets of gradients by their own global norm, update, and return the norms before the clip.

        A gradient that is not finite makes its norm so too: the caller decides what to do about it.
        """
        norms = GradientNorms(
            dense=_clip(self._dense, self.config.dense_clip),
            embedding=_clip(self._tables, self.config.embedding_clip),
        )
        self.steps += 1
        warm = min(1.0, self.steps / self.config.warmup_steps) if self.config.warmup_steps else 1.0
        for group in self.dense.param_groups:
            group["lr"] = self.config.dense_lr * warm
        self.dense.step()
        self.embedding.step()
        return norms

    def state_dict(self) -> dict[str, Any]:
        """Return everything that decides the next step but the weights."""
        return {
            "config": asdict(self.config),
            "steps": self.steps,
            "dense": self.dense.state_dict(),
            "embedding": self.embedding.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; learning rates stay those of this object's configuration.

        Raises:
            BadConfigError: if it was saved with another dense optimizer.
        """
        if state["config"]["dense"] != self.config.dense:
            raise BadConfigError(
                f"optimizer.dense = {self.config.dense!r}, but the saved state is of {state['config']['dense']!r}"
            )
        self.steps = state["steps"]
        self.dense.load_state_dict(state["dense"])
        self.embedding.load_state_dict(state["embedding"])
        for group in self.embedding.param_groups:
            group["lr"] = self.config.embedding_lr


def build_optimizers(model: RankingModel, config: OptimizerConfig) -> Optimizers:
    """Return the optimizers of a model."""
    return Optimizers(model, config)


@torch.no_grad()
def _clip(parameters: list[nn.Parameter], limit: float) -> float:
    """Scale all gradients together so that their global norm is at most ``limit``; return the norm before."""
    values: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            # Rows that occur twice must be added up before they are squared.
            parameter.grad = parameter.grad.coalesce()
            values.append(parameter.grad.values())
        else:
            values.append(parameter.grad)
    if not values:
        return 0.0
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(values)))
    torch._foreach_mul_(values, (limit / (norm + 1e-6)).clamp(max=1.0))
    return float(norm)
