"""One step of a day: a process, its output in the task's log, and what its exit code means to Airflow.

A step is never code inside Airflow: it is ``python -m ...`` with the
environment of the worker, so that it can be run by hand, killed, timed and
given memory like any other program.  Its exit code says what to do next (the
other end of this table is ``onetrans/errors.py``):

=====  ==================  ==================================================
 0     done                success
65     bad data            failure, not retried
75     not ready           failure, retried
78     bad configuration   failure, not retried
other  anything else       failure, retried: a lost executor or connection
=====  ==================  ==================================================
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import selectors
import shlex
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Any, NoReturn

from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import (
    AirflowException,
    AirflowFailException,
    AirflowRuntimeError,
    AirflowSkipException,
    AirflowTaskTimeout,
    TaskDeferralError,
    TaskDeferralTimeout,
)

from dags.days import is_backfill, run_day
from dags.exit_codes import EXIT_BAD_CONFIG, EXIT_BAD_DATA, EXIT_NOT_READY, EXIT_OK, FINAL
from dags.notify import task_failed
from dags.others import NotStartedError, Other, Seen, by_hand, look_at
from dags.triggers import NOTHING_AHEAD, StepTrigger

DAY = "{{ day }}"
"""Placeholder for the run's day in the arguments of a step."""

PREVIOUS_DAY = "{{ previous_day }}"
"""Placeholder for the day before it."""

DEFAULTS: dict[str, Any] = {
    "owner": "ranking",
    "retries": 3,
    "retry_delay": timedelta(minutes=1),
    "retry_exponential_backoff": 2.0,
    "max_retry_delay": timedelta(minutes=30),
    "on_failure_callback": task_failed,
}
"""Arguments of every task."""

DEFAULT_POOL = "default_pool"
"""Airflow's own: steps that are short, and waits."""
SPARK_POOL = "ranking_spark"
"""Pool of steps that run Spark, or hold a day's rows in memory."""
GPU_POOL = "ranking_gpu"
"""Pool of steps that train or score."""
REGISTRY_POOL = "ranking_registry"
"""Pool of the step that moves the champion: one at a time, on whatever workers, as MLflow cannot compare and swap."""

NOTHING_TO_DO = "nothing to do"
"""How the result of a look begins at a day that the log lost (``source.absent_days``): its run is skipped."""

UNHARMED = "Published data is as it was."
"""What a step that fails says of published data, unless the step knows better."""

CLEAR = "clear this task"
"""What is to be done once data or settings are corrected, unless another task takes them in."""

_GRACE_S = 3.0
"""Seconds between asking a step to end and killing it; Airflow kills the task itself after five."""
_READ = 1 << 16
_PR_SET_PDEATHSIG = 1
_ERROR_LINE = re.compile(r"^(?:[\w$]+\.)*\w*(?:Error|Exception): ")
_JAVA_FRAME = re.compile(r"\s*(?:at [\w.$]|\.\.\. \d+ more)")
_SEE_LINE = re.compile(r"see: (\S.*)$")
_HINTS = (
    (re.compile(r"No space left on device|Disk quota exceeded"), "The disk is full: make room for it; `onetrans retain "
     "--dry-run` lists what nobody needs any more."),
    (re.compile(r"java\.lang\.OutOfMemoryError"), "Spark has too little memory: raise spark.driver_memory, or its "
     "executors'."),
    (re.compile(r"CUDA out of memory"), "The GPU has too little memory: set training.recompute; or lower "
     "training.batch_size and clear `plan`, which pins it."),
)  # fmt: skip
"""What to do about an error of somebody else's, whose own words do not say it."""
_SEVERITY = (
    (re.compile(r"\b(?:ERROR|CRITICAL|FATAL)\b"), logging.ERROR),
    (re.compile(r"\bWARN(?:ING)?\b"), logging.WARNING),
)


class Step(BaseOperator):
    """Runs ``python -m MODULE ARGUMENTS`` and returns the last line it printed."""

    template_fields = ("arguments", "environment")
    ui_color = "#e8f1fb"

    def __init__(
        self,
        *,
        module: str,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        unharmed: str = UNHARMED,
        clear: str = CLEAR,
        dated: bool = True,
        nothing_done: str = "",
        **kwargs: Any,
    ) -> None:
        """Describe a step.

        Args:
            module: what ``python -m`` runs.
            arguments: its arguments; templated, with :data:`DAY` for the run's day; one that renders empty is left out.
            environment: variables set on top of the worker's; templated; one that renders empty is left as it is.
            unharmed: what a failure of this step leaves as it was, a sentence.
            clear: what to clear once data or settings are corrected: the task that takes them in.
            dated: whether it works on a day; one that does not also runs where the run names none.
            nothing_done: how its result begins where there was nothing to do; the task is then skipped, and what
                follows it, so its assets hear of nothing.  Empty: there always is.
            **kwargs: those of every operator.
        """
        super().__init__(**kwargs)
        self.dated = dated
        self.nothing_done = nothing_done
        self.module = module
        self.arguments = list(arguments)
        self.environment = dict(environment or {})
        self.unharmed = unharmed
        self.clear = clear
        self._group: int | None = None

    def render_template_fields(self, context: Any, jinja_env: Any = None) -> None:
        """Render the templates, which know the run's ``day``."""
        extended: Any = context
        if self.dated:
            try:
                day = run_day(context)
            except AirflowFailException as error:
                raise AirflowFailException(f"{self.task_id}: REFUSED. {error} {self.unharmed}") from error
            extended = {**context, "day": day, "previous_day": str(date.fromisoformat(day) - timedelta(days=1))}
        super().render_template_fields(extended, jinja_env)

    @property
    def command(self) -> list[str]:
        """The command line, run by the worker's own interpreter."""
        return [sys.executable, "-m", self.module, *(text for text in self.arguments if text)]

    @property
    def variables(self) -> dict[str, str]:
        """The variables this step sets."""
        return {name: text for name, text in self.environment.items() if text}

    def execute(self, context: Any) -> str | None:
        """Run the process to its end; the text it printed last becomes the task's result."""
        ended = self._ended(context)
        self._raise_for(context, ended)
        self._skip_if_nothing_done(context, ended)
        self._tell_assets(context, ended.result)
        return ended.result

    def _skip_if_nothing_done(self, context: Any, ended: Ended) -> None:
        if self.nothing_done and (ended.result or "").startswith(self.nothing_done):
            raise AirflowSkipException(f"{self._title(context)}: {ended.result}")

    def resume_execution(self, next_method: str, next_kwargs: dict[str, Any] | None, context: Any) -> Any:
        """Take over from the triggerer; a wait that broke there is told of in the words of any other failure."""
        try:
            return super().resume_execution(next_method, next_kwargs, context)
        except (TaskDeferralError, TaskDeferralTimeout) as error:
            why = f"The wait in the triggerer broke off: {str(error).rstrip('.')}; its traceback is above."
            raise AirflowException(self._paragraph(context, "WAIT BROKE OFF", why)) from error

    def _ended(self, context: Any) -> Ended:
        """Run the process; one that takes too long is told of in the words of any other failure."""
        try:
            return self.run_process()
        except AirflowTaskTimeout as error:
            raise AirflowTaskTimeout(self._too_slow(context)) from error

    def _too_slow(self, context: Any) -> str:
        why = f"It ran for longer than {self.execution_timeout}, its execution_timeout, and was ended."
        return self._paragraph(context, "TOO SLOW", why)

    def _paragraph(self, context: Any, kind: str, why: str) -> str:
        """Return what a failure that is tried again ends the log with."""
        return f"{self._title(context)}: {kind}. {why} {self.unharmed} {_what_next(*_tries(context))}"

    def run_process(self) -> Ended:
        """Run the process, stream its output into the log, and leave no process of its group behind."""
        settings = " ".join(f"{name}={shlex.quote(text)}" for name, text in self.variables.items())
        self.log.info("%s", f"{settings} {shlex.join(self.command)}".strip())
        process = subprocess.Popen(
            self.command,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **self.variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=_ends_with(os.getpid()),
        )
        self._group = process.pid
        try:
            result, error = self._stream(process)
        finally:
            # What the step started (a JVM, data loaders) goes with it, however this ends.
            _signal_group(self._group, signal.SIGKILL)
            self._group = None
            code = process.wait()
        return Ended(code, result, error.text, error.see)

    def _stream(self, process: subprocess.Popen[bytes]) -> tuple[str | None, _ErrorText]:
        """Log the output while it comes; return the last line of stdout and the error at the end of stderr."""
        result: str | None = None
        error = _ErrorText()
        with selectors.DefaultSelector() as selector:
            for stream in (process.stdout, process.stderr):
                assert stream is not None
                os.set_blocking(stream.fileno(), False)
                selector.register(stream, selectors.EVENT_READ, _Lines())
            while selector.get_map():
                ready = selector.select(timeout=0.5)
                for key, _ in ready:
                    chunk = key.fileobj.read(_READ)  # type: ignore[union-attr]
                    for line in key.data.add(chunk):
                        self.log.log(_severity(line), "%s", line)
                        if key.fileobj is process.stderr:
                            error.add(line)
                        elif line.strip():
                            result = line.strip()
                    if not chunk:
                        selector.unregister(key.fileobj)
                if not ready and _has_ended(process.pid):
                    # The process is gone but something it started keeps its output open.
                    _signal_group(process.pid, signal.SIGKILL)
        return result, error

    def on_kill(self) -> None:
        """End the process with everything it started: ask, and kill what is left after a moment."""
        group = self._group
        if group is None:
            return
        self.log.warning("%s", f"ending {shlex.join(self.command)}")
        _signal_group(group, signal.SIGTERM)
        timer = threading.Timer(_GRACE_S, _signal_group, (group, signal.SIGKILL))
        timer.daemon = True
        timer.start()

    def _raise_for(self, context: Any, ended: Ended) -> None:
        raise_for(self._title(context), ended, self.unharmed, *_tries(context), clear=self.clear)

    def _title(self, context: Any) -> str:
        return f"{self.task_id} of {run_day(context)}" if self.dated else self.task_id

    def _tell_assets(self, context: Any, result: str | None) -> None:
        for asset in self.outlets:
            context["outlet_events"][asset].extra = {"ds": run_day(context), "result": result}


class WaitStep(Step):
    """Waits until its process is ready (exit code 0), and holds no worker while it waits.

    The first look is made at once, in the worker, so that a day that is there
    costs one short process.  Else the triggerer runs the same command with
    ``--wait``; a look that fails otherwise counts as "not yet", for an hour.  Other runs may
    have to end first, and one that has failed may leave nothing to wait for.
    A wait without a module is for other runs alone.
    """

    def __init__(
        self,
        *,
        at_most: timedelta,
        module: str = "",
        others: Sequence[Other] = (),
        others_of_a_backfill: Sequence[Other] | None = None,
        if_nothing_before: Sequence[str] = (),
        refuse: Callable[[Mapping[str, Any]], str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Describe a wait.

        Args:
            at_most: how long to wait.
            module: what ``python -m`` runs to look; empty: other runs are all there is to wait for.
            others: other runs that matter.
            others_of_a_backfill: those that matter to a run of a backfill; None: the same.
            if_nothing_before: arguments that the process gets besides where no earlier run is open or has failed.
            refuse: returns why a run as it was asked for cannot be; empty: it can. Asked before anything is waited for.
            **kwargs: those of :class:`Step`.
        """
        super().__init__(module=module, **kwargs)
        self.at_most = at_most
        self.others = list(others)
        self.others_of_a_backfill = list(others if others_of_a_backfill is None else others_of_a_backfill)
        self.if_nothing_before = list(if_nothing_before)
        self.refuse = refuse

    def execute(self, context: Any) -> str | None:
        """Look once; if it is too early, wait in the triggerer."""
        refused = self.refuse(context) if self.refuse else ""
        if refused:
            raise AirflowFailException(
                f"{self._title(context)}: REFUSED. {refused} {self.unharmed} Airflow does not retry this: start a run "
                "with other values."
            )
        chosen = self.others_of_a_backfill if is_backfill(context) else self.others
        others = [other.of(run_day(context)) for other in chosen]
        try:
            for other in others:
                other["run_ids"] = by_hand(other["dag_id"], other["day"])
            seen = look_at(others)
        except AirflowRuntimeError as error:
            why = f"Airflow does not say how other runs stand: {error}"
            self._raise_for(context, Ended(EXIT_NOT_READY, None, why))
            raise
        if seen.stop:
            self._stop(context, seen.stop, seen.behind_failure)
        if not seen.waiting:
            ended = self._look(context, seen) if self.module else Ended(EXIT_OK, NOTHING_AHEAD, "")
            if ended.code in FINAL or (seen.unless_ready and ended.code != EXIT_NOT_READY):
                # With nothing to wait for, a catalog that is away is a matter of the next try.
                self._raise_for(context, ended)
                self._skip_if_nothing_done(context, ended)
                return ended.result
            if seen.unless_ready:
                self._stop(context, seen.stops_for(ended.error), seen.behind_failure)
        waiting = seen.waiting or seen.queued
        self.log.info("%s", f"{waiting} not ready yet; the triggerer waits for it, at most {self.at_most}".strip())
        self.defer(
            trigger=StepTrigger(
                command=self.command if self.module else [],
                variables=self.variables,
                until=(datetime.now(UTC) + self.at_most).isoformat(),
                others=others,
                if_nothing_before=self.if_nothing_before,
            ),
            method_name="resume",
        )

    def _look(self, context: Any, seen: Seen) -> Ended:
        given = self.arguments
        self.arguments = [*given, *(self.if_nothing_before if seen.nothing_before else ())]
        try:
            return self._ended(context)
        finally:
            self.arguments = given

    def resume(self, context: Any, event: Mapping[str, Any]) -> str | None:
        """Take over from the triggerer once it is ready, too late, or there is nothing to wait for."""
        ended = Ended(event["code"], event["result"], event["error"])
        if event["stop"]:
            self._stop(context, event["stop"], event.get("behind_failure", False))
        if event["late"]:
            raise AirflowFailException(
                f"{self._title(context)}: still not ready after {self.at_most}. {ended.error} {self.unharmed} "
                "Airflow does not retry this: clear this task once it is ready, or run the day again."
            )
        self._raise_for(context, ended)
        self._skip_if_nothing_done(context, ended)
        return ended.result

    def _stop(self, context: Any, why: str, behind_failure: bool) -> NoReturn:
        text = f"{self._title(context)}: NOT STARTED. {why} {self.unharmed}"
        raise NotStartedError(text, behind_failure=behind_failure)


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    """Exit code; minus the signal's number when a signal ended it."""
    result: str | None
    """Last line printed on stdout."""
    error: str
    """The error at the end of stderr, or its last lines."""
    see: str = ""
    """Where the process said that a person sees more."""
    why: str = ""
    """What whoever ended it says of that, a sentence."""


def ended_by(code: int, text: str, why: str = "") -> Ended:
    """Return how a process ended that ran elsewhere.

    Args:
        code: its exit code; 128 and more mean a signal, as a shell and a container tell it.
        text: the end of its output.
        why: what whoever ended it says of that, a sentence.
    """
    error = _ErrorText()
    for line in text.splitlines():
        error.add(line)
    return Ended(128 - code if 128 < code < 128 + signal.NSIG else code, None, error.text, error.see, why)


def raise_for(
    title: str, ended: Ended, unharmed: str = UNHARMED, this_try: int = 0, tries: int = 0, *, clear: str = CLEAR
) -> None:
    """Turn a failed process into the exception that makes Airflow do what the exit code asks for.

    Its text is one paragraph: step and day, what is wrong, what is unharmed, what happens next or is to be done.

    Args:
        title: the step and its day.
        ended: how the process ended.
        unharmed: what the failure leaves as it was, a sentence.
        this_try: number of this try, from 1.
        tries: tries the task has in all.
        clear: what to clear once data or settings are corrected.

    Raises:
        AirflowFailException: bad data or bad configuration; not retried.
        AirflowException: anything else that is not success; retried while tries are left.
    """
    if ended.code == EXIT_OK:
        return
    error = ended.error.rstrip()
    hints = [hint for pattern, hint in _HINTS if pattern.search(error)]
    if ended.code < 0 and error and not _ERROR_LINE.match(error):
        # Nobody who is killed says why: what is there is how far it was.
        error = f"It had last said: {error.splitlines()[-1]}"
    error = error if not error or error[-1] in ".!?" else f"{error}."
    found = " ".join(filter(None, [ended.why, error, *hints, "" if unharmed in error else unharmed]))
    see = f" See {ended.see}" if ended.see else ""
    if ended.code == EXIT_BAD_DATA:
        raise AirflowFailException(
            f"{title}: BAD DATA. {found} Airflow does not retry this: correct the data, then {clear}.{see}"
        )
    if ended.code == EXIT_BAD_CONFIG:
        raise AirflowFailException(
            f"{title}: BAD CONFIGURATION. {found} Airflow does not retry this: correct it, then {clear}.{see}"
        )
    then = f"{_what_next(this_try, tries)}{see}"
    if ended.code == EXIT_NOT_READY:
        raise AirflowException(f"{title}: NOT READY. {found} {then}")
    if ended.code < 0:
        name = signal.Signals(-ended.code).name
        hint = " The system does this when memory runs out." if ended.code == -signal.SIGKILL and not ended.why else ""
        raise AirflowException(f"{title}: ended by {name}.{hint} {found} {then}")
    raise AirflowException(f"{title}: FAILED with exit code {ended.code}. {found} {then}")


def _what_next(this_try: int, tries: int) -> str:
    if this_try < tries:
        return f"Airflow tries it again: this was try {this_try} of {tries}."
    return "This was the last try: mend the cause, then clear this task."


def _tries(context: Mapping[str, Any]) -> tuple[int, int]:
    """Return the number of this try and of all tries, those after a clear included."""
    task_instance = context["ti"]
    return task_instance.try_number, task_instance.max_tries + 1


@dataclass
class _Lines:
    """Cuts a stream of bytes into lines of text."""

    rest: bytes = b""

    def add(self, chunk: bytes) -> list[str]:
        """Return the lines that are whole now; an empty chunk, the end, completes the last one."""
        *whole, self.rest = (self.rest + chunk).split(b"\n")
        if not chunk and self.rest:
            whole, self.rest = [*whole, self.rest], b""
        return [line.decode(errors="replace").rstrip("\r") for line in whole]


@dataclass
class _ErrorText:
    """Finds in what a process wrote to stderr the error, from the last line that names one to the end, and the page."""

    lines: deque[str] = field(default_factory=lambda: deque(maxlen=40))
    see: str = ""

    def add(self, line: str) -> None:
        """Take one line; Java's stack frames would push out the line that says what went wrong."""
        page = _SEE_LINE.match(line)
        if page:
            self.see = page.group(1).strip()
        elif line.strip() and not _JAVA_FRAME.match(line):
            self.lines.append(line.rstrip())

    @property
    def text(self) -> str:
        """The error, or the last few lines if none is named."""
        lines = list(self.lines)
        starts = [number for number, line in enumerate(lines) if _ERROR_LINE.match(line)]
        return "\n".join(lines[starts[-1] :] if starts else lines[-5:])


def _severity(line: str) -> int:
    if _ERROR_LINE.match(line):
        return logging.ERROR
    return next((level for pattern, level in _SEVERITY if pattern.search(line)), logging.INFO)


def _ends_with(parent: int) -> Callable[[], None] | None:
    """Return what a child does first, so that it ends with this process even if that is killed.

    Airflow starts the next try of a task whose worker was killed; the process of the first must not go on beside it.
    Linux alone knows this.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl

    def begin() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # It was killed before the line above.
            os.kill(os.getpid(), signal.SIGKILL)

    return begin


def _has_ended(pid: int) -> bool:
    """Tell whether a child has ended, without collecting it, so that its group cannot be another's yet."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _signal_group(group: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
