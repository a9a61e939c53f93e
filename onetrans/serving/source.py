"""Where a served model comes from: an address of the registry, of MLflow, or a folder; and the batch kept with it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from onetrans import storage
from onetrans.errors import BadConfigError, BadDataError, NotReadyError
from onetrans.settings import MlflowSettings
from onetrans.tracking import (
    CHECK_FOLDER,
    CHECK_REQUESTS,
    CHECK_SCORES,
    MODEL_FOLDER,
    TAG_DAY,
    TAG_MODEL_ID,
    connect,
    fetch_folder,
    require_store,
    store_is_there,
)

_HEADER = "model.json"


@dataclass(frozen=True)
class ModelSource:
    """A model that can be loaded."""

    address: str
    """As it was asked for."""
    version: str
    """Version in the registry; the model's id or folder where it has none. Stands in every answer."""
    folder: str
    """Saved model (:mod:`onetrans.artifact`)."""
    check: str | None
    """Folder of the fixed batch and its scores; None if there is none."""
    day: str
    """Day it was evaluated on; empty if that is not known."""


def resolve(address: str, mlflow: MlflowSettings) -> ModelSource:
    """Return what an address names now; files in an object store or on a server are downloaded.

    Raises:
        BadConfigError: if it is not understood or names nothing.
        NotReadyError: if it names an alias that no version has yet, or there is no registry yet; none is made.
    """
    if address.startswith("models:/"):
        return _registered(address, mlflow)
    if address.startswith("runs:/"):
        require_store(mlflow)
        run_id = address.removeprefix("runs:/").split("/")[0]
        tags = _asked(address, lambda: connect(mlflow).get_run(run_id)).data.tags
        if TAG_MODEL_ID not in tags:
            raise BadConfigError(f"{address}: no model was logged by this run")
        return _logged(address, tags[TAG_MODEL_ID], tags[TAG_MODEL_ID], tags.get(TAG_DAY, ""), mlflow)
    for folder in (address, storage.join(address, MODEL_FOLDER), storage.join(address, "artifacts", MODEL_FOLDER)):
        if storage.exists(storage.join(folder, _HEADER)):
            beside = storage.join(folder.rstrip("/").rpartition("/")[0] or ".", CHECK_FOLDER)
            check = beside if storage.exists(storage.join(beside, CHECK_SCORES)) else None
            return ModelSource(address, address, folder, check, "")
    raise BadConfigError(
        f"{address} names no model: it is no folder with {_HEADER}, and does not begin with models:/ or runs:/"
    )


def current_version(address: str, mlflow: MlflowSettings) -> str | None:
    """Return the version an alias names now, None if there is none; of any other address, what never changes.

    Raises:
        BadConfigError: if the address is not understood.
    """
    name, separator, alias = address.removeprefix("models:/").partition("@")
    if not address.startswith("models:/") or not separator:
        return address
    from onetrans.registry import Registry

    version = Registry(replace(mlflow, registered_model=name)).by_alias(alias)
    return None if version is None else str(version.version)


def fixed_batch(source: ModelSource) -> tuple[list[dict[str, Any]], list[dict[str, Any]]] | None:
    """Return the requests kept with a model and the scores the trained model gave them, or None.

    Raises:
        BadDataError: if only a part is there.
    """
    if source.check is None:
        return None
    try:
        return (
            storage.read_json(storage.join(source.check, CHECK_REQUESTS)),
            storage.read_json(storage.join(source.check, CHECK_SCORES)),
        )
    except FileNotFoundError as error:
        raise BadDataError(f"{source.address}: the batch to check with is not whole: {error}") from error


def _registered(address: str, mlflow: MlflowSettings) -> ModelSource:
    from onetrans.registry import Registry

    rest = address.removeprefix("models:/")
    name, at, alias = rest.partition("@")
    name, slash, number = (name, "", "") if at else rest.partition("/")
    if not at:
        require_store(mlflow)
    if not at and not slash:
        return _logged(address, rest, rest, "", mlflow)
    registry = Registry(replace(mlflow, registered_model=name))
    if at and not store_is_there(mlflow):
        version = None
    else:
        version = registry.by_alias(alias) if at else registry.version(number)
    if version is None:
        raise NotReadyError(
            f"{name} has no alias {alias!r} yet: no day was promoted. See: onetrans registry list, onetrans report"
        )
    if TAG_MODEL_ID not in version.tags:
        raise BadDataError(
            f"{address}: version {version.version} was not registered by this pipeline: it has no tag {TAG_MODEL_ID!r}"
        )
    return _logged(address, str(version.version), version.tags[TAG_MODEL_ID], version.tags.get(TAG_DAY, ""), mlflow)


def _logged(address: str, version: str, model_id: str, day: str, mlflow: MlflowSettings) -> ModelSource:
    folder = _asked(address, lambda: fetch_folder(mlflow, model_id, MODEL_FOLDER))
    check = _asked(address, lambda: fetch_folder(mlflow, model_id, CHECK_FOLDER))
    return ModelSource(address, version, folder, check, day)


def _asked(address: str, ask: Any) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return ask()
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise BadConfigError(f"{address} names nothing in MLflow: {error.message}") from error
        raise
    except OSError as error:
        raise BadDataError(f"{address}: the files of the model cannot be read: {error}") from error
