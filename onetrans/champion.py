"""The champion as an opponent: which version serves now, and its scores of a day's rows.

A candidate is compared with the version that would go on serving if it were not
promoted.  That version is loaded from the registry, with the feature schema it was
trained with: tables may have gained features since, and it reads those it knows.

It is not compared when that would be unfair or empty: there is none, it is the
candidate itself, or it was trained for a later day, so it has seen these rows.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onetrans import storage
from onetrans.artifact import load_model
from onetrans.errors import BadDataError
from onetrans.models import RankingModel
from onetrans.plan import Plan
from onetrans.registry import CHAMPION, Registry
from onetrans.schema import FeatureSchema
from onetrans.scores import ChampionRecord, ChampionState
from onetrans.settings import Settings
from onetrans.tracking import (
    MODEL_FOLDER,
    TAG_DAY,
    TAG_MODEL_DIGEST,
    TAG_MODEL_ID,
    TAG_PLAN,
    answering,
    fetched_folder,
    folder_digest,
)

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opponent:
    """The champion of this moment."""

    record: ChampionRecord
    """Which version it is, and whether it can be compared."""
    model: RankingModel | None = None
    """The loaded model, in evaluation mode; only where the state is ``scored``."""
    schema: FeatureSchema | None = None
    """The schema it was trained with."""


def current_champion(settings: Settings, plan: Plan) -> Opponent:
    """Ask the registry for the champion and load it, if it can be compared with a plan's candidate.

    Raises:
        NotReadyError: if the registry does not answer.
        BadDataError: if its files are gone or are not the ones that were promoted.
    """
    if not plan.mlflow_run_id:
        return Opponent(ChampionRecord("untracked", "no champion: the plan was made without MLflow"))
    if settings.gate.mode == "off":
        return Opponent(ChampionRecord("off", "the champion was not compared: gate.mode = off"))
    with answering(settings.mlflow):
        registry = Registry(settings.mlflow)
        version = registry.by_alias(CHAMPION)
        if version is None:
            return Opponent(ChampionRecord("none", f"{registry.name} has no champion yet"))
        record = _record(version, plan)
        if record.state != "scored":
            return Opponent(record)
        model, schema = _load(settings, version)
    return Opponent(record, model, schema)


def _record(version: ModelVersion, plan: Plan) -> ChampionRecord:
    number, ds = str(version.version), version.tags.get(TAG_DAY)

    def record(state: ChampionState, note: str) -> ChampionRecord:
        return ChampionRecord(state, note, number, ds, version.tags.get(TAG_MODEL_DIGEST))

    if version.tags.get(TAG_PLAN) == plan.plan_id:
        return record("candidate", f"the candidate is the champion already, version {number}")
    if ds is None or TAG_MODEL_ID not in version.tags or TAG_MODEL_DIGEST not in version.tags:
        return record("incomparable", f"champion version {number} has no day or no model: others registered it")
    if ds > str(plan.ds):
        return record("later", f"champion version {number} was trained for {ds} and has seen the rows of {plan.ds}")
    return record("scored", f"champion version {number}, of {ds}, scored the same rows")


def _load(settings: Settings, version: ModelVersion) -> tuple[RankingModel, FeatureSchema]:
    from mlflow.exceptions import MlflowException

    name = f"champion version {version.version} ({version.tags[TAG_DAY]})"
    try:
        with fetched_folder(settings.mlflow, version.tags[TAG_MODEL_ID], MODEL_FOLDER) as folder:
            digest = folder_digest(folder)
            if digest != version.tags[TAG_MODEL_DIGEST]:
                raise BadDataError(
                    f"its files are not those that were registered (SHA-256 {digest[:12]}, expected "
                    f"{version.tags[TAG_MODEL_DIGEST][:12]})"
                )
            model, schema, _ = load_model(folder)
    except (OSError, MlflowException, BadDataError) as error:
        gone = getattr(error, "error_code", "") in ("", "RESOURCE_DOES_NOT_EXIST")
        if storage.is_lost(error) or not gone:
            raise
        raise BadDataError(
            f"{name} cannot be loaded: {error}. Serving cannot load it either. Nothing was promoted. Restore its "
            "files, or make a sound version champion: onetrans registry rollback --reason TEXT, or onetrans registry "
            "promote --version N --reason TEXT; then run this step again"
        ) from error
    return model.eval(), schema
