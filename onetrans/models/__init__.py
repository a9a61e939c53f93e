"""The two ranking models: OneTrans and the DCNv2+DIN baseline.

Configurations are read by steps that never touch a tensor (plan, gate, promote),
so torch is imported only when a model class is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from onetrans.models.config import (
    DCNv2DINConfig,
    ModelConfig,
    OneTransConfig,
    config_from_dict,
    config_to_dict,
    model_name,
    preset,
)
from onetrans.schema import FeatureSchema

if TYPE_CHECKING:
    from onetrans.models.dcnv2_din import DCNv2DIN
    from onetrans.models.onetrans import OneTrans
    from onetrans.models.ranking import RankingModel, Scores

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

_NEEDS_TORCH = {
    "DCNv2DIN": "onetrans.models.dcnv2_din",
    "OneTrans": "onetrans.models.onetrans",
    "RankingModel": "onetrans.models.ranking",
    "Scores": "onetrans.models.ranking",
}


def __getattr__(name: str) -> Any:
    if name in _NEEDS_TORCH:
        return getattr(import_module(_NEEDS_TORCH[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def build_model(config: ModelConfig, schema: FeatureSchema) -> RankingModel:
    """Return a model with fresh weights, drawn from torch's global generator.

    Raises:
        BadConfigError: if the configuration does not fit the schema.
    """
    from onetrans.models.dcnv2_din import DCNv2DIN
    from onetrans.models.onetrans import OneTrans

    if isinstance(config, OneTransConfig):
        return OneTrans(config, schema)
    return DCNv2DIN(config, schema)
