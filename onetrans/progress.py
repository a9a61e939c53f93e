"""Progress of long work: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

from onetrans.errors import NotReadyError

logger = logging.getLogger(__name__)

SAID_AFTER_S = 2.0
"""Seconds of work that needs no word, for ``after``."""

LOOK_EVERY_S = 5.0
"""Seconds between two looks of :func:`wait_for`."""

_BEAT_S = 0.5
_LOG_EVERY_S = 15.0

Found = TypeVar("Found")


class Progress:
    """Counts work done and shows its speed and the time left.

    Use as a context manager and call :meth:`advance`.  On a terminal this is a
    bar; elsewhere a log line at most every :data:`_LOG_EVERY_S` seconds, and one at the
    end.  One that is not ``shown`` never draws a bar: several processes share a terminal.
    What was done ``before``, by a process that was killed, counts as done and not as speed.
    Work that is done within ``after`` seconds says nothing.
    """

    def __init__(
        self,
        total: int | None,
        unit: str,
        label: str,
        *,
        shown: bool = True,
        after: float = 0.0,
        before: int = 0,
    ) -> None:
        self.total = total
        self.unit = unit
        self.label = label
        self.done = self.before = before
        bar = shown and sys.stderr.isatty()
        self.after = after
        self._bar = (
            tqdm(total=total, unit=unit, unit_scale=True, desc=label, delay=after, initial=before) if bar else None
        )
        self._start = self._last = time.monotonic()
        self._notes = ""
        self._said = False

    def advance(self, count: int, **notes: float) -> None:
        """Add ``count`` units done; ``notes`` (loss, AUC, ...) are shown beside the speed."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
            if notes:
                self._bar.set_postfix({name: f"{value:.4f}" for name, value in notes.items()}, refresh=False)
            return
        self._notes = "".join(f", {name} {value:.4f}" for name, value in notes.items())
        now = time.monotonic()
        if now - self._last >= _LOG_EVERY_S:
            self._last = now
            self._log()

    def beat(self) -> None:
        """Say how far it is without more done, where one unit takes long: after ``after`` seconds, then as ever."""
        now = time.monotonic()
        if now - self._start < self.after:
            return
        if self._bar is not None:
            self._bar.refresh()
        elif not self._said or now - self._last >= _LOG_EVERY_S:
            self._last = now
            self._log()

    @property
    def rate(self) -> float:
        """Units per second since the start."""
        return (self.done - self.before) / max(time.monotonic() - self._start, 1e-9)

    def _log(self, *, ended: bool = False) -> None:
        self._said = True
        share, left = "", ""
        if not self.done:
            words = "%s: done in %.0f s" if ended else "%s: %.0f s so far"
            logger.info(words, self.label, time.monotonic() - self._start)
            return
        if self.total:
            share = f" of {self.total:,} ({100 * self.done / self.total:.0f} %)"
            left = f", {max(self.total - self.done, 0) / max(self.rate, 1e-9):.0f} s left"
        logger.info(
            "%s: %s%s %s, %.0f %s/s%s%s",
            self.label,
            f"{self.done:,}",
            share,
            self.unit,
            self.rate,
            self.unit,
            left,
            self._notes,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None and time.monotonic() - self._start >= self.after:
            self._log(ended=True)


@contextmanager
def long_steps(total: int | None, label: str) -> Iterator[Progress]:
    """Show a few steps (None: one call) that may take long each; within :data:`SAID_AFTER_S` nothing is said.

    The caller advances as steps are done.  Meanwhile a thread says that it goes on: whoever waits for one call of a
    library sees it too.
    """
    ended = threading.Event()

    def watch(progress: Progress) -> None:
        while not ended.wait(_BEAT_S):
            progress.beat()

    with Progress(total, "steps", label, after=SAID_AFTER_S) as progress:
        thread = threading.Thread(target=watch, args=(progress,), daemon=True)
        thread.start()
        try:
            yield progress
        finally:
            ended.set()
            thread.join()


def wait_for(look: Callable[[], Found], seconds: float, label: str) -> Found:
    """Return what a look finds; while there is nothing yet, look again, for so many seconds.

    Args:
        look: raises :class:`~onetrans.errors.NotReadyError` where nothing is there yet.
        seconds: longest wait; 0: one look.
        label: what is waited for.

    Raises:
        NotReadyError: that of the last look.
    """
    deadline = time.monotonic() + seconds
    with long_steps(None, f"waiting for {label}"):
        while True:
            try:
                return look()
            except NotReadyError:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise
            time.sleep(min(LOOK_EVERY_S, left))
