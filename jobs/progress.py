"""Progress of work that Spark does: how many of its tasks are done, asked of the driver once a second."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from py4j.protocol import Py4JError
from pyspark import SparkContext

from onetrans.progress import SAID_AFTER_S, Progress

_EVERY_S = 1.0


@contextmanager
def watched(context: SparkContext, label: str, total: int | None = None) -> Iterator[None]:
    """Show the tasks that Spark finishes while the block runs; work of a moment shows nothing.

    Args:
        context: of the running session.
        label: what is being done.
        total: tasks there will be, where that is known: Spark itself decides it on the way.
    """
    ended = threading.Event()
    before = set(context.statusTracker().getJobIdsForGroup(None))

    def watch(progress: Progress) -> None:
        try:
            while not ended.wait(_EVERY_S):
                progress.advance(_finished(context, before) - progress.done)
        except (Py4JError, ConnectionError, OSError):
            return  # the JVM is gone: whoever works with it says so

    with Progress(total, "tasks", label, after=SAID_AFTER_S) as progress:
        thread = threading.Thread(target=watch, args=(progress,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(_EVERY_S)
        if total is not None:
            progress.advance(total - progress.done)


def _finished(context: SparkContext, before: set[int]) -> int:
    """Return the finished tasks of the jobs that were started since."""
    tracker = context.statusTracker()
    jobs = [tracker.getJobInfo(job) for job in set(tracker.getJobIdsForGroup(None)) - before]
    stages = [tracker.getStageInfo(stage) for job in jobs if job for stage in job.stageIds]
    return sum(stage.numCompletedTasks for stage in stages if stage)
