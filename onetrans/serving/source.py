"""Where a served model comes from: an address of the registry, of MLflow, or a folder; and the batch kept with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

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
    fetched_folder,
    require_store,
    store_is_there,
)

_HEADER = "model.json"


FixedBatch = tuple[list[dict[str, Any]], list[dict[str, Any]]]
"""Requests kept with a model, and the scores that the trained model gave them."""


@dataclass(frozen=True)
class ModelSource:
    """A model that can be loaded."""

    address: str
    """As it was asked for."""
    version: str
    """Version in the registry; the model's id or folder where it has none. Stands in every answer."""
    folder: str
    """Saved model (:mod:`onetrans.artifact`); a copy of one lies there while the block of :func:`opened` lasts."""
    kept: FixedBatch | None
    """The fixed batch; None if there is none."""
    day: str
    """Day it was evaluated on; empty if that is not known."""


@contextmanager
def opened(address: str, mlflow: MlflowSettings) -> Iterator[ModelSource]:
    """Give what an address names now; files in an object store or on a server are downloaded for the while.

    Raises:
        BadConfigError: if it is not understood or names nothing.
        NotReadyError: if it names an alias that no version has yet, or there is no registry yet; none is made.
        BadDataError: if its files are gone or damaged; a connection or a disk that fails is none of that.
    """
    if not address.startswith(("models:/", "runs:/")):
        yield _saved(address)
        return
    named = _registered(address, mlflow) if address.startswith("models:/") else _of_run(address, mlflow)
    with ExitStack() as copies:
        folder = _asked(address, lambda: copies.enter_context(fetched_folder(mlflow, named.model_id, MODEL_FOLDER)))
        kept = _asked(address, lambda: _kept_with(address, named.model_id, mlflow))
        yield ModelSource(address, named.version, folder, kept, named.day)


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


class _Named(NamedTuple):
    """What an address of MLflow's names."""

    version: str
    model_id: str
    day: str


def _saved(address: str) -> ModelSource:
    for folder in (address, storage.join(address, MODEL_FOLDER), storage.join(address, "artifacts", MODEL_FOLDER)):
        if storage.exists(storage.join(folder, _HEADER)):
            beside = storage.join(folder.rstrip("/").rpartition("/")[0] or ".", CHECK_FOLDER)
            there = storage.exists(storage.join(beside, CHECK_SCORES))
            return ModelSource(address, address, folder, _fixed_batch(address, beside) if there else None, "")
    raise BadConfigError(
        f"{address} names no model: it is no folder with {_HEADER}, and does not begin with models:/ or runs:/"
    )


def _fixed_batch(address: str, folder: str) -> FixedBatch:
    try:
        return (
            storage.read_json(storage.join(folder, CHECK_REQUESTS)),
            storage.read_json(storage.join(folder, CHECK_SCORES)),
        )
    except FileNotFoundError as error:
        raise BadDataError(f"{address}: the batch to check with is not whole: {error}") from error


def _kept_with(address: str, model_id: str, mlflow: MlflowSettings) -> FixedBatch:
    with fetched_folder(mlflow, model_id, CHECK_FOLDER) as folder:
        return _fixed_batch(address, folder)


def _of_run(address: str, mlflow: MlflowSettings) -> _Named:
    require_store(mlflow)
    run_id = address.removeprefix("runs:/").split("/")[0]
    tags = _asked(address, lambda: connect(mlflow).get_run(run_id)).data.tags
    if TAG_MODEL_ID not in tags:
        raise BadConfigError(f"{address}: no model was logged by this run")
    return _Named(tags[TAG_MODEL_ID], tags[TAG_MODEL_ID], tags.get(TAG_DAY, ""))


def _registered(address: str, mlflow: MlflowSettings) -> _Named:
    from onetrans.registry import Registry

    rest = address.removeprefix("models:/")
    name, at, alias = rest.partition("@")
    name, slash, number = (name, "", "") if at else rest.partition("/")
    if not at:
        require_store(mlflow)
    if not at and not slash:
        return _Named(rest, rest, "")
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
    return _Named(str(version.version), version.tags[TAG_MODEL_ID], version.tags.get(TAG_DAY, ""))


def _asked(address: str, ask: Any) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return ask()
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise BadConfigError(f"{address} names nothing in MLflow: {error.message}") from error
        raise
    except OSError as error:
        if storage.is_lost(error):
            raise
        raise BadDataError(f"{address}: the files of the model cannot be read: {error}") from error
