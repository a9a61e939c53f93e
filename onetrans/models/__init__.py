"""The two ranking models: OneTrans and the DCNv2+DIN baseline."""

from __future__ import annotations

from onetrans.models.config import (
    DCNv2DINConfig,
    ModelConfig,
    OneTransConfig,
    config_from_dict,
    config_to_dict,
    model_name,
    preset,
)
from onetrans.models.dcnv2_din import DCNv2DIN
from onetrans.models.onetrans import OneTrans
from onetrans.models.ranking import RankingModel, Scores
from onetrans.schema import FeatureSchema

__all__ = [
    "DCNv2DIN",
    "DCNv2DINConfig",
    "ModelConfig",
    "OneTrans",
    "OneTransConfig",
    "RankingModel",
    "Scores",
    "build_model",
    "config_from_dict",
    "config_to_dict",
    "model_name",
    "preset",
]


def build_model(config: ModelConfig, schema: FeatureSchema) -> RankingModel:
    """Return a model with fresh weights, drawn from torch's global generator.

    Raises:
        BadConfigError: if the configuration does not fit the schema.
    """
    if isinstance(config, OneTransConfig):
        return OneTrans(config, schema)
    return DCNv2DIN(config, schema)
