"""Models that score as trained ones do, and their gradients: for tests that compare two ways to compute the same."""

from __future__ import annotations

import torch

from onetrans.models import RankingModel, build_model
from onetrans.models.config import ModelConfig
from onetrans.schema import FeatureSchema


def trained_like(config: ModelConfig, schema: FeatureSchema, seed: int = 0) -> RankingModel:
    """Return a model whose tables are as large as a trained model's, so that scores depend on the inputs."""
    torch.manual_seed(seed)
    model = build_model(config, schema)
    with torch.no_grad():
        for table in model.embedding_parameters().values():
            table.mul_(20.0)
        for name, parameter in model.named_parameters():
            if name.endswith("bias.time_KH"):
                parameter.normal_()  # starts at zero
    return model


def gradients(model: RankingModel, scores: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the gradient of every parameter for a loss that weighs every score differently."""
    ctr, cvr = scores
    weights = torch.linspace(0.5, 1.5, ctr.shape[0], dtype=ctr.dtype, device=ctr.device)
    loss = (ctr * weights).sum() + (cvr.square() * weights.flip(0)).sum()
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient.to_dense()
        for (name, parameter), gradient in zip(model.named_parameters(), found, strict=True)
    }
