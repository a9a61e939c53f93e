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

from dags.steps import Ended, ended_by

GPU = "nvidia.com/gpu"
LOGS_EVERY_S = 30
"""Seconds after which the triggerer copies new lines of the pod's log into the task's."""
START_S = 3600
"""Seconds a pod may wait for a free GPU; Airflow's default of two minutes is for pods that fit anywhere."""


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
        execution_timeout: timedelta | None,
        **kwargs: Any,
    ) -> None:
        """Describe a pod.

        Args:
            task_id: of the step.
            template: path of the pod's YAML, a copy of ``infra/kubernetes/training_pod.yaml``.
            command: program and arguments.
            variables: environment variables on top of the template's.
            execution_timeout: after which it is deleted.
            **kwargs: what Airflow adds to every operator.
        """
        super().__init__(
            task_id=task_id,
            name=task_id,
            pod_template_file=template,
            cmds=list(command[:1]),
            arguments=list(command[1:]),
            env_vars=dict(variables),
            deferrable=True,
            logging_interval=LOGS_EVERY_S,
            startup_timeout_seconds=START_S,
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
            PodEndedError: if it failed.
        """
        try:
            super().cleanup(pod, remote_pod, xcom_result, context)
        except AirflowException as error:
            raise PodEndedError(how_it_ended(remote_pod, self.base_container_name)) from error


def how_it_ended(pod: Any, container: str) -> Ended:
    """Return how the process in a pod ended.

    Args:
        pod: what Kubernetes last said of it.
        container: its container.
    """
    found = next((c for c in (pod.status.container_statuses or []) if c.name == container), None)
    ended = found.state.terminated if found is not None and found.state else None
    if ended is None:
        reason = f"{pod.status.reason or pod.status.phase}: {pod.status.message or 'its process did not begin'}"
        return Ended(1, None, f"Pod {pod.metadata.name} ended before its process did ({reason})")
    why = "" if ended.message else f"Pod {pod.metadata.name} says no more than {ended.reason or 'its exit code'}."
    if ended.reason == "OOMKilled":
        why = "The container passed its memory limit (OOMKilled): raise it in the pod's template."
    return ended_by(int(ended.exit_code), ended.message or "", why)


def gpus(template: Mapping[str, Any], container: str = "base") -> int:
    """Return the GPUs a pod's template asks for; 0 if none.

    Args:
        template: content of the YAML file.
        container: the container that trains.
    """
    limits = _container(template, container).get("resources", {}).get("limits") or {}
    return int(limits.get(GPU, 0))


def brings(template: Mapping[str, Any], variable: str, container: str = "base") -> bool:
    """Tell whether a pod's template may bring a variable: by its name, or in a secret whose content is not known here.

    Args:
        template: content of the YAML file.
        variable: its name.
        container: the container that trains.
    """
    described = _container(template, container)
    return any(entry["name"] == variable for entry in described.get("env") or ()) or any(
        "secretRef" in source for source in described.get("envFrom") or ()
    )


def _container(template: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return next((described for described in template["spec"]["containers"] if described["name"] == name), {})
