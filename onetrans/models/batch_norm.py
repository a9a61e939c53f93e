"""Batch normalisation over the rows of a whole batch, also where several processes share it.

PyTorch's own synchronised form runs on GPUs only.  Sums, not means, are exchanged,
so that shares of different sizes, empty ones too, give the statistics of all rows.

Shape suffixes: N  rows (of this process)     F  features
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onetrans.distributed import sum_over_ranks


class BatchNorm(nn.BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d`, but a batch of fewer than two rows is normalised with the running statistics."""

    over_ranks = False
    """Whether a batch is what all ranks have together; every rank must then run every training step."""

    def forward(self, x_NF: Tensor) -> Tensor:
        """Return (N, F)."""
        if not self.training:
            return super().forward(x_NF)
        if self.over_ranks:
            return self._over_ranks(x_NF)
        return super().forward(x_NF) if x_NF.shape[0] > 1 else self._by_running_statistics(x_NF)

    def _by_running_statistics(self, x_NF: Tensor) -> Tensor:
        return F.batch_norm(x_NF, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)

    def _over_ranks(self, given_NF: Tensor) -> Tensor:
        x_NF = given_NF.float() if given_NF.dtype in (torch.bfloat16, torch.float16) else given_NF
        sums = sum_over_ranks(torch.cat((x_NF.sum(0), x_NF.new_full((1,), x_NF.shape[0]))))
        mean_F, rows = sums[:-1] / sums[-1], float(sums[-1].detach())
        if rows < 2:
            return self._by_running_statistics(given_NF)
        centred_NF = x_NF - mean_F
        # Squares of the centred rows: a difference of two large sums would lose digits.
        var_F = sum_over_ranks(centred_NF.square().sum(0)) / rows
        self._keep(mean_F.detach(), var_F.detach() * (rows / (rows - 1)))
        y_NF = centred_NF * (var_F + self.eps).rsqrt() * self.weight + self.bias
        return y_NF.to(given_NF.dtype)

    @torch.no_grad()
    def _keep(self, mean_F: Tensor, var_F: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean_F, self.momentum)
        self.running_var.lerp_(var_F, self.momentum)


def share_batches(model: nn.Module, ranks: int) -> None:
    """Make a model's batch normalisation cover what several ranks have together."""
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.over_ranks = ranks > 1
