"""Optimizers: one for the embedding tables, one for everything else, each with its own gradient clip.

Their settings are in :mod:`onetrans.optim_config`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any, NamedTuple, Protocol, overload

import torch
from torch import Tensor, nn

from onetrans.errors import BadConfigError
from onetrans.models import RankingModel
from onetrans.models.rowwise import keep_gradient_memory
from onetrans.optim_config import OptimizerConfig


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
            if parameters[0].device.type == "cpu":
                for each in zip(parameters, gradients, sums, strict=True):
                    self._step_in_pieces(*each, group)
                continue
            torch._foreach_mul_(sums, group["alpha"])
            torch._foreach_addcmul_(sums, gradients, gradients)
            roots = torch._foreach_sqrt(sums)
            torch._foreach_add_(roots, group["eps"])
            torch._foreach_addcdiv_(parameters, gradients, roots, value=-group["lr"])
        return loss

    @staticmethod
    def _step_in_pieces(parameter: Tensor, gradient: Tensor, total: Tensor, group: dict[str, Any]) -> None:
        """Update one parameter piece by piece, so that what lies between two operations stays in a core's cache."""
        pieces = (x.view(-1).split(_PIECE) for x in (parameter, gradient.contiguous(), total))
        root = parameter.new_empty(min(parameter.numel(), _PIECE))
        for weight, slope, square_sum in zip(*pieces, strict=True):
            square_sum.mul_(group["alpha"]).addcmul_(slope, slope)
            torch.sqrt(square_sum, out=root[: weight.shape[0]]).add_(group["eps"])
            weight.addcdiv_(slope, root[: weight.shape[0]], value=-group["lr"])


_CLIP_EPS = 1e-6

_PIECE = 1 << 17
"""Numbers of a tensor that RMSPropV2 updates at a time on a CPU."""


class GradientNorms(NamedTuple):
    """Global norms before clipping."""

    dense: float
    embedding: float


class ShardedUpdate(Protocol):
    """Tables that are updated where their rows are held (:mod:`onetrans.sharding`)."""

    def norm_bound(self) -> float:
        """Return a number that the norm of their gradients does not exceed."""

    def update(self, scale: float) -> None:
        """Update them by their gradients times ``scale``."""


class Optimizers:
    """The two optimizers of a model, stepped, saved and restored as one."""

    def __init__(self, model: RankingModel, config: OptimizerConfig) -> None:
        self.config = config
        self.steps = 0
        self.sharded: ShardedUpdate | None = None
        # Adagrad builds sparse tensors from coalesced gradients; torch warns until someone says that is trusted.
        torch.sparse.check_sparse_tensor_invariants.disable()
        self._tables = list(model.embedding_parameters().values())
        self._dense = list(model.dense_parameters().values())
        # A group of its own, so that there may be no table left that is not sharded.
        self.embedding = torch.optim.Adagrad(
            [{"params": self._tables}], lr=config.embedding_lr, initial_accumulator_value=config.embedding_accumulator
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
            # One pass over all weights; the default form makes about ten for each tensor.
            self.dense = torch.optim.AdamW(groups, lr=config.dense_lr, fused=True)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        self.embedding.zero_grad(set_to_none=True)
        for parameter in self._dense:
            keep_gradient_memory(parameter)

    def step(self) -> GradientNorms:
        """Clip both sets of gradients by their own global norm, update, and return the norms before the clip.

        A gradient that is not finite makes its norm so too; then nothing is clipped or updated, so that the caller
        finds weights and gradients as they were.
        """
        dense, tables = _gradient_values(self._dense), _gradient_values(self._tables)
        elsewhere = self.sharded.norm_bound() if self.sharded else 0.0
        norms = GradientNorms(dense=_norm(dense), embedding=_norm(tables, elsewhere))
        if not math.isfinite(sum(norms)):
            return norms
        _clip(dense, norms.dense, self.config.dense_clip)
        _clip(tables, norms.embedding, self.config.embedding_clip)
        self.steps += 1
        warm = min(1.0, self.steps / self.config.warmup_steps) if self.config.warmup_steps else 1.0
        for group in self.dense.param_groups:
            group["lr"] = self.config.dense_lr * warm
        self.dense.step()
        self.embedding.step()
        if self.sharded:
            self.sharded.update(min(1.0, self.config.embedding_clip / (norms.embedding + _CLIP_EPS)))
        return norms

    @torch.no_grad()
    def forget_rows(self, table: nn.Parameter, rows: Tensor) -> None:
        """Put the state of some rows of an embedding table back to where it begins."""
        self.embedding.state[table]["sum"][rows] = self.config.embedding_accumulator

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
        if self.config.dense == "adamw":
            for group in self.dense.param_groups:
                group["fused"] = True
        self.embedding.load_state_dict(state["embedding"])
        for group in self.embedding.param_groups:
            group["lr"] = self.config.embedding_lr


def build_optimizers(model: RankingModel, config: OptimizerConfig) -> Optimizers:
    """Return the optimizers of a model."""
    return Optimizers(model, config)


def _gradient_values(parameters: list[nn.Parameter]) -> list[Tensor]:
    """Return the gradients that there are, of a sparse one its values, a row once."""
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
    return values


@torch.no_grad()
def _norm(values: list[Tensor], elsewhere: float = 0.0) -> float:
    """Return the global norm of some gradients; ``elsewhere`` is that of others, which belong to them."""
    if not values:
        return elsewhere
    norms = list(torch._foreach_norm(values))
    if elsewhere:
        norms.append(norms[0].new_tensor(elsewhere))
    return float(torch.linalg.vector_norm(torch.stack(norms)))


@torch.no_grad()
def _clip(values: list[Tensor], norm: float, limit: float) -> None:
    """Scale gradients together so that their global norm is at most ``limit``, given what it is."""
    if norm + _CLIP_EPS > limit:
        torch._foreach_mul_(values, limit / (norm + _CLIP_EPS))
