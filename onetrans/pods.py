"""What the pod of a step is made of: its template, the settings it gets, and why there can be none.

``launch.pod_template`` is a copy of ``infra/kubernetes/training_pod.yaml``.  The step
(``dags/launch.py``) and ``onetrans doctor`` both ask here, so that nothing is refused
at night of which the evening's look said ``ok``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import yaml

from onetrans import storage
from onetrans.errors import BadConfigError, holds_password
from onetrans.settings import Settings, as_environment

CONTAINER = "base"
"""The container of the template that runs the step."""
GPU = "nvidia.com/gpu"
EXAMPLE_REGISTRY = "registry.example.com"
"""Where the files in infra/ have their images, for a person to change."""

_SHARED = (("training", "runs"), ("lake", "warehouse"))
"""Settings that name what workers and pods both read and write."""
_OWN = ("ONETRANS_AIRFLOW_", "ONETRANS_LAUNCH_", "ONETRANS_SERVING_")
"""Variables that mean nothing in a pod."""
_COPY = (
    "copy infra/kubernetes/training_pod.yaml, change what is marked CHANGE, and name the copy in launch.pod_template"
)


class Refusal(NamedTuple):
    """Why no pod can be made that would do its work."""

    found: str
    """What was found, in words."""
    mend: str
    """What to do about it."""


class PodRefusedError(BadConfigError):
    """The settings or the template make no pod; all that is to be changed is in :attr:`refusals`."""

    def __init__(self, refusals: Sequence[Refusal]) -> None:
        super().__init__(". ".join(f"{found}; {mend}" for found, mend in refusals))
        self.refusals = list(refusals)


@dataclass(frozen=True)
class Pod:
    """What is added to the template."""

    template: str
    """Its file."""
    image: str
    """Image of its container."""
    gpus: int
    """GPUs it asks for."""
    variables: Mapping[str, str]
    """The settings."""
    secrets: Mapping[str, str]
    """Variable whose address holds a password -> the secret that has to hold it under that very name."""


@dataclass(frozen=True)
class _Template:
    images: list[str]
    """Of all containers, the step's first."""
    gpus: int
    named: set[str]
    """Variables that it brings itself."""
    secrets: list[str]
    """Secrets whose whole content it brings."""


def pod_of(settings: Settings) -> Pod:
    """Return what a step's pod is made of.

    A pod has no configuration file of its own, so it gets the settings as variables.  Whoever may look at pods reads
    them, so an address with a password is left to a secret of the template: by the name of the variable, as Kubernetes
    then starts no pod without it, which would go on with the default.

    Raises:
        PodRefusedError: if there is no template, or a pod would not see what these settings name.
    """
    template = _read(settings.launch.pod_template)
    refusals = list(_of_one_machine(settings))
    if any(image.startswith(f"{EXAMPLE_REGISTRY}/") for image in template.images):
        found = f"{settings.launch.pod_template} still names an image of {EXAMPLE_REGISTRY}, the example's"
        refusals.append(Refusal(found, _COPY))
    variables, secrets = {"ONETRANS_CONFIG": ""}, {}  # an image may name the file that a worker mounts
    for name, text in as_environment(settings).items():
        if name.startswith(_OWN) or (holds_password(text) and name in template.named):
            continue
        if not holds_password(text):
            variables[name] = text
        elif len(template.secrets) == 1:
            secrets[name] = template.secrets[0]
        else:
            told = f"several secrets ({', '.join(template.secrets)})" if template.secrets else "no secret"
            found = (
                f"{name} holds a password, which is not written into a pod for all to read, and the template in "
                f"launch.pod_template names {told} in the envFrom of its container {CONTAINER!r}"
            )
            mend = (
                f"name one there that holds {name}, or name the variable in its env by valueFrom.secretKeyRef, or take "
                "the password out of the address"
            )
            refusals.append(Refusal(found, mend))
    if refusals:
        raise PodRefusedError(refusals)
    return Pod(settings.launch.pod_template, template.images[0], template.gpus, variables, secrets)


def _read(path: str) -> _Template:
    if not path:
        found = "launch.place = 'kubernetes', but launch.pod_template names no template"
        raise PodRefusedError([Refusal(found, _COPY)])
    try:
        described = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        found = f"launch.pod_template = {path!r} cannot be read: {error.strerror}"
        raise PodRefusedError([Refusal(found, _COPY)]) from error
    except (yaml.YAMLError, ValueError) as error:
        raise PodRefusedError([Refusal(_no_pod(path, error), _COPY)]) from error
    try:
        spec = described["spec"]
        container = next(one for one in spec["containers"] if one["name"] == CONTAINER)
        others = [one for one in (*(spec.get("initContainers") or ()), *spec["containers"]) if one is not container]
        sources = [source for source in container.get("envFrom") or () if not source.get("prefix")]
        return _Template(
            images=[str(one["image"]) for one in (container, *others)],
            gpus=int(((container.get("resources") or {}).get("limits") or {}).get(GPU, 0)),
            named={entry["name"] for entry in container.get("env") or ()},
            secrets=list(dict.fromkeys(source["secretRef"]["name"] for source in sources if "secretRef" in source)),
        )
    except StopIteration:
        why = f"none of its containers is called {CONTAINER!r}"
        raise PodRefusedError([Refusal(_no_pod(path, why), _COPY)]) from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise PodRefusedError([Refusal(_no_pod(path, repr(error)), _COPY)]) from error


def _no_pod(path: str, why: object) -> str:
    return f"launch.pod_template = {path!r} describes no pod for a step ({' '.join(str(why).split())})"


def _of_one_machine(settings: Settings) -> Iterator[Refusal]:
    """Yield what another machine than the worker would not see."""
    for section, field in _SHARED:
        value = str(getattr(getattr(settings, section), field))
        if not value.startswith("/") and "://" not in value:
            yield Refusal(
                f"{section}.{field} = {value!r} is a folder of this machine, which a pod does not see",
                "name an address (s3://...), or the absolute path of a volume that workers and pods mount",
            )
    if settings.mlflow.tracking_uri.startswith("sqlite"):
        yield Refusal(
            f"mlflow.tracking_uri = {settings.mlflow.tracking_uri!r} is a file of this machine",
            "pods need a server of MLflow's, http://... or https://...",
        )
    catalog, warehouse = settings.lake.catalog_uri, settings.lake.warehouse
    shared = os.path.normpath(storage.local_path(warehouse)) if warehouse.startswith(("/", "file:///")) else ""
    if not catalog and shared:
        return  # a file in the warehouse
    file = storage.sqlite_file(catalog)
    if file is not None and shared and Path(os.path.normpath(file)).is_relative_to(shared):
        return
    if not catalog or catalog.startswith("sqlite"):
        yield Refusal(
            f"lake.catalog_uri = {catalog!r}: the catalog of tables is a SQLite file of this machine",
            "pods need a database, postgresql+psycopg://..., a REST catalog, or the file in a lake.warehouse on a "
            "volume that workers and pods mount",
        )
