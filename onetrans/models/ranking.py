"""What both models have in common: their interface, their outputs and the heads that compute them.

Shape suffixes: those of :mod:`onetrans.batch`, and

    F  width of a state given to the heads     C  tasks (CTR, CVR)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from onetrans.batch import RequestBatch
from onetrans.models.compute import Compute
from onetrans.models.config import ModelConfig
from onetrans.models.embeddings import TABLE, Embeddings
from onetrans.models.rowwise import wide_linear
from onetrans.schema import FeatureSchema


class Scores(NamedTuple):
    """One score per task for each of a batch's N candidates, in the batch's order."""

    ctr_logit_N: Tensor
    """Log-odds of a click given the impression."""
    cvr_logit_N: Tensor
    """Log-odds of a conversion given the click."""


class RankingModel(nn.Module):
    """A model that scores the candidates of a batch; each score depends on its own request and candidate alone."""

    parts: ClassVar[Mapping[str, str]] = {}
    """What a profile shows beside the embeddings: name of a part of the forward pass, and the method that does it."""

    def __init__(self, config: ModelConfig, schema: FeatureSchema) -> None:
        super().__init__()
        self.config = config
        self.schema = schema
        self.compute = Compute()
        self.embeddings = Embeddings(
            schema,
            config.embedding_dim,
            admit_after=config.admit_after,
            evict_after_days=config.evict_after_days,
        )

    def forward(self, batch: RequestBatch) -> Scores:
        """Score every candidate of ``batch``."""
        raise NotImplementedError

    def use(self, compute: Compute) -> None:
        """Choose how the model is computed from now on."""
        self.compute = compute

    def autocast(self) -> torch.autocast:
        """Return the context in which matrix products have the chosen precision."""
        device = next(self.parameters()).device.type
        return torch.autocast(device, dtype=torch.bfloat16, enabled=self.compute.precision == "bfloat16")

    def embedding_parameters(self) -> dict[str, nn.Parameter]:
        """Return the embedding tables by parameter name; the gradient of a large one is sparse."""
        named = self.embeddings.named_parameters()
        return {f"embeddings.{name}": parameter for name, parameter in named if name.startswith(TABLE)}

    def dense_parameters(self) -> dict[str, nn.Parameter]:
        """Return every other parameter by name, the maps of vector features among them."""
        tables = self.embedding_parameters()
        return {name: parameter for name, parameter in self.named_parameters() if name not in tables}


class Heads(nn.Module):
    """One MLP with a hidden layer per task, on the same state."""

    def __init__(self, state_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.ctr = nn.Sequential(nn.Linear(state_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, 1))
        self.cvr = nn.Sequential(nn.Linear(state_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, 1))

    def forward(self, state_NF: Tensor) -> Scores:
        """Return the logits of both tasks, in float32 also where the model runs in half precision."""
        ctr_N, cvr_N = self.ctr(state_NF).squeeze(-1), self.cvr(state_NF).squeeze(-1)
        return Scores(_at_least_float32(ctr_N), _at_least_float32(cvr_N))


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RequestCandidateLinear(nn.Module):
    """A linear layer over [request ; candidate] whose request part is computed once per request.

    ``y = W [r ; c] + b`` equals ``W_r r + W_c c + b``, so nothing is repeated for the candidates of a request
    but the sum.
    """

    def __init__(self, request_dim: int, candidate_dim: int, out_dim: int) -> None:
        super().__init__()
        self.request_dim = request_dim
        self.linear = nn.Linear(request_dim + candidate_dim, out_dim)

    def forward(self, request_RF: Tensor, candidate_NF: Tensor, request_N: Tensor) -> Tensor:
        """Return (N, out); ``request_N`` is the request of each candidate."""
        of_r, of_c = wide_linear((request_RF, candidate_NF), self.linear.weight, self.linear.bias)
        return of_r.index_select(0, request_N) + of_c
