"""Where a training or an evaluation runs: on the worker, or in a pod of its own with a GPU.

``launch.place`` says it, and nothing else of the DAG changes:

``worker``      a process of the worker, as every step; ``training.processes`` of them, by ``torchrun``, if more than
                one
``kubernetes``  a pod made of ``launch.pod_template``, with one process for each of its GPUs, watched by the triggerer

Either way the step's exit code decides what Airflow does, and the process's output is in the task's log.  A try that
was cut off left a checkpoint in ``training.runs``; the next goes on from there, wherever it runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

from airflow.sdk.exceptions import AirflowException, AirflowFailException

from dags.configured import configured
from dags.steps import EXIT_BAD_CONFIG, Ended, Step, raise_for

PLACES = ("worker", "kubernetes")
_NOT_AS_ASKED = (400, 401, 403, 404, 422)
"""Answers to a pod's creation that no next try changes: rights, a namespace, what the template says."""


class ClusterAwayError(AirflowException):
    """The cluster does not answer, or not now; its text is the paragraph that the log ends with."""


class LaunchStep(Step):
    """A step that runs where ``launch.place`` says."""

    def __init__(self, *, parallel: bool = False, **kwargs: Any) -> None:
        """Describe a step.

        Args:
            parallel: whether its command takes several processes, one per GPU; else it is one, wherever it runs.
            **kwargs: those of :class:`Step`.
        """
        super().__init__(**kwargs)
        self.parallel = parallel
        self._pod: Any = None

    def execute(self, context: Any) -> str | None:
        """Run the process here, or hand a pod to the triggerer."""
        place = configured("launch", "place", PLACES[0])
        if place not in PLACES:
            self._bad(context, f"launch.place = {place!r} is none of {', '.join(PLACES)}")
        if place == "worker":
            return super().execute(context)
        self._pod = self._make_pod(context)
        with self._cluster_tells(context, refused=_NOT_AS_ASKED):
            self._pod.start(context)
        return None

    def trigger_reentry(self, context: Any, event: Mapping[str, Any]) -> None:
        """Take over from the triggerer: the pod has ended, or its time is up."""
        self._pod = self._make_pod(context)
        from dags.pods import PodEndedError, PodNotMadeError

        try:
            with self._cluster_tells(context):
                self._pod.trigger_reentry(context, dict(event))
        except PodNotMadeError as error:
            self._bad(context, str(error))
        except PodEndedError as error:
            if event["status"] == "timeout":
                raise AirflowException(self._late(context, str(event["message"]))) from error
            self._raise_for(context, error.ended)
        except (AirflowFailException, ClusterAwayError):
            raise
        except AirflowException as error:
            # Deleted, evicted, or its node is gone.
            why = f"{str(error).rstrip('.')}. What it did since its last checkpoint is lost, and nothing else."
            raise AirflowException(self._paragraph(context, "POD LOST", why)) from error

    @contextmanager
    def _cluster_tells(self, context: Any, refused: tuple[int, ...] = ()) -> Iterator[None]:
        """Tell what the cluster refuses, or that it does not answer, in the words of any other failure.

        Args:
            context: of the task.
            refused: answers that no next try changes; any other is a matter of the next.
        """
        from kubernetes.client.exceptions import ApiException
        from kubernetes.config import ConfigException
        from urllib3.exceptions import HTTPError

        try:
            yield
        except ApiException as error:
            said = f"Kubernetes answered {error.status} {error.reason}: {_message(error.body)}"
            if error.status in refused and "exceeded quota" not in said:
                self._bad(context, said)
            self._away(context, said, error)
        except ConfigException as error:
            self._bad(context, f"the connection to Kubernetes cannot be used: {error}")
        except HTTPError as error:
            self._away(context, f"Kubernetes does not answer: {error}", error)

    def _away(self, context: Any, why: str, error: Exception) -> NoReturn:
        raise ClusterAwayError(self._paragraph(context, "NOT READY", f"{why.rstrip('.')}.")) from error

    def _late(self, context: Any, message: str) -> str:
        """Return what the log ends with where time was up: that of the step, or that of a pod to get a node and begin.

        Airflow's event has one status for both, and names the first limit in its message.
        """
        if "execution_timeout" in message:
            return self._too_slow(context)
        return self._paragraph(context, "POD NOT STARTED", f"{message.rstrip('.')}. Nothing of it ran.")

    def on_kill(self) -> None:
        """End the process, or delete the pod."""
        if self._pod is not None:
            self._pod.on_kill()
        else:
            super().on_kill()

    def _make_pod(self, context: Any) -> Any:
        try:
            from dags.pods import StepPod
        except ImportError as error:
            self._bad(
                context,
                f"launch.place = 'kubernetes' needs a package that is not installed here ({error}); in a checkout "
                "`make env` brings it, elsewhere: pip install 'PATH/TO/onetrans.whl[kubernetes]'",
            )
        from onetrans.errors import PipelineError
        from onetrans.pods import pod_of
        from onetrans.settings import load_settings

        try:
            pod = pod_of(load_settings())
        except PipelineError as error:
            self._bad(context, str(error))
        for name, secret in pod.secrets.items():
            self.log.info("%s", f"{name} holds a password, so the pod reads it from the secret {secret!r}")
        return StepPod(
            task_id=self.task_id,
            template=pod.template,
            command=["python", *self.command[1:]],  # the image's Python, not this worker's
            variables={**pod.variables, **self.variables, **self._processes(pod.gpus)},
            secrets=pod.secrets,
            execution_timeout=self.execution_timeout,
        )

    def _processes(self, wanted: int) -> dict[str, str]:
        """Return how many processes a pod trains with: one for each of its GPUs, whatever fits the worker."""
        return {"ONETRANS_TRAINING_PROCESSES": str(max(1, wanted) if self.parallel else 1)}

    def _bad(self, context: Any, why: str) -> NoReturn:
        """Refuse what is read anew in each try, whatever has to be cleared for what the step itself refuses."""
        raise_for(self._title(context), Ended(EXIT_BAD_CONFIG, None, why), self.unharmed)
        raise AssertionError("unreachable: the exit code says that it failed")


def _message(body: str | bytes | None) -> str:
    """Return what Kubernetes says in an answer that refuses."""
    try:
        return str(json.loads(body or "{}")["message"])
    except (ValueError, KeyError, TypeError):
        return str(body or "no reason given")[:200]
