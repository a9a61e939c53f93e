"""A Kubernetes pod that runs one step, and how it ended, in the terms of ``dags/steps.py``.

Imported only where ``launch.place`` is ``kubernetes``: it needs
the extra ``kubernetes``, which nothing else does (in a checkout ``make env`` has it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
from airflow.sdk.exceptions import AirflowException
from kubernetes.client import V1EnvVar, V1EnvVarSource, V1SecretKeySelector

from dags.steps import Ended, ended_by

LOGS_EVERY_S = 30
"""Seconds after which the triggerer copies new lines of the pod's log into the task's."""
START_S = 3600
"""Seconds a pod may wait for a free GPU; Airflow's default of two minutes is for pods that fit anywhere."""
CREATE_S = 1800
"""Seconds its node may then take to fetch the image and make the container."""

_NOT_MADE = ("CreateContainerConfigError", "InvalidImageName")
"""Why a container waits that no waiting will make: a secret or a key of it is not there, or what the template says."""


class PodNotMadeError(AirflowException):
    """The pod's description asks for what the cluster does not have; its text says for what."""


class PodEndedError(AirflowException):
    """The pod's process failed; how, is in :attr:`ended`."""

    def __init__(self, ended: Ended) -> None:
        super().__init__(ended.error)
        self.ended = ended


class StepPod(KubernetesPodOperator):
    """The pod of one try of a step; watched by the triggerer, so it holds no worker."""

    def __init__(
        self,
        *,
        task_id: str,
        template: str,
        command: Sequence[str],
        variables: Mapping[str, str],
        secrets: Mapping[str, str],
        execution_timeout: timedelta | None,
        **kwargs: Any,
    ) -> None:
        """Describe a pod.

        Args:
            task_id: of the step.
            template: path of the pod's YAML, a copy of ``infra/kubernetes/training_pod.yaml``.
            command: program and arguments.
            variables: environment variables on top of the template's.
            secrets: further ones, and the secret that holds each under its name.
            execution_timeout: after which it is deleted.
            **kwargs: what Airflow adds to every operator.
        """
        super().__init__(
            task_id=task_id,
            name=task_id,
            pod_template_file=template,
            cmds=list(command[:1]),
            arguments=list(command[1:]),
            env_vars=[
                *(V1EnvVar(name=name, value=text) for name, text in variables.items()),
                *(V1EnvVar(name=name, value_from=_in_secret(secret, name)) for name, secret in secrets.items()),
            ],
            deferrable=True,
            logging_interval=LOGS_EVERY_S,
            schedule_timeout_seconds=START_S,
            startup_timeout_seconds=CREATE_S,
            termination_message_policy="FallbackToLogsOnError",
            # The whole pod in the log would bury the one paragraph that matters; its state is in the events.
            log_pod_spec_on_failure=False,
            log_events_on_failure=True,
            execution_timeout=execution_timeout,
            **kwargs,
        )

    def start(self, context: Any) -> None:
        """Create the pod, or find the one that a try which was cut off has left running, and wait in the triggerer."""
        self.name = self._set_name(self.task_id)
        self.execute_async(context)

    def cleanup(self, pod: Any, remote_pod: Any, xcom_result: Any = None, context: Any = None) -> None:
        """Delete the pod as ever, and tell how its process ended.

        Raises:
            PodNotMadeError: if it never began, and never would.
            PodEndedError: if it failed.
        """
        try:
            super().cleanup(pod, remote_pod, xcom_result, context)
        except AirflowException as error:
            lacks = not_made(remote_pod, self.base_container_name)
            if lacks:
                raise PodNotMadeError(lacks) from error
            raise PodEndedError(how_it_ended(remote_pod, self.base_container_name)) from error


def _in_secret(secret: str, key: str) -> V1EnvVarSource:
    return V1EnvVarSource(secret_key_ref=V1SecretKeySelector(name=secret, key=key))


def not_made(pod: Any, container: str) -> str:
    """Return what a pod's container asks for that the cluster does not have; empty: nothing.

    Args:
        pod: what Kubernetes last said of it.
        container: its container.
    """
    found = _status(pod, container)
    waiting = found.state.waiting if found is not None and found.state else None
    if waiting is None or waiting.reason not in _NOT_MADE:
        return ""
    return (
        f"Kubernetes does not make pod {pod.metadata.name} ({waiting.reason}): {waiting.message or 'it says no more'}"
    )


def _status(pod: Any, container: str) -> Any:
    return next((c for c in (pod.status.container_statuses or []) if c.name == container), None)


def how_it_ended(pod: Any, container: str) -> Ended:
    """Return how the process in a pod ended.

    Args:
        pod: what Kubernetes last said of it.
        container: its container.
    """
    found = _status(pod, container)
    ended = found.state.terminated if found is not None and found.state else None
    if ended is None:
        reason = f"{pod.status.reason or pod.status.phase}: {pod.status.message or 'its process did not begin'}"
        return Ended(1, None, f"Pod {pod.metadata.name} ended before its process did ({reason})")
    why = "" if ended.message else f"Pod {pod.metadata.name} says no more than {ended.reason or 'its exit code'}."
    if ended.reason == "OOMKilled":
        why = "The container passed its memory limit (OOMKilled): raise it in the pod's template."
    return ended_by(int(ended.exit_code), ended.message or "", why)
