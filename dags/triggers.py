"""A wait that holds no worker: the triggerer keeps one process that looks until it has an answer."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from airflow.sdk.exceptions import AirflowRuntimeError
from airflow.triggers.base import BaseTrigger, TriggerEvent

from dags.exit_codes import EXIT_NOT_READY, FINAL
from dags.others import Seen, State, look_at, name_of, states_of

NOTHING_AHEAD = "no other run has to end first"
"""Result of a wait for other runs alone."""

_GOES_WELL_S = 60.0
"""Seconds after which a command that breaks had gone well before: it looks for as long as it is told to."""

_GIVEN_UP: dict[State, tuple[str, str]] = {
    "none": ("has not been run", "Run it first"),
    "queued": (
        "has been queued, or has waited to begin,",
        "Its turn comes when those before have ended; wait for its end",
    ),
    "stuck": ("has been queued", "It begins by itself now that this run has ended; wait for its end"),
}
"""State that is not waited for any longer -> what is said of it, and what is to be done."""


class StepTrigger(BaseTrigger):
    """Runs a waiting command until its exit code is final (:data:`dags.exit_codes.FINAL`), or it is too late.

    The command gets ``--wait SECONDS`` with the time that is left.  If it ends
    with any other code (a catalog that does not answer), it is started again
    after a pause; one that does nothing but break for ``broken_s`` ends the wait.
    It runs only while no other run has to end first, and when another run has failed
    it is asked once more, whether there is anything to wait for.  Without a command
    the wait is over when no other run has to end first.

    The event holds ``code``, ``result`` (last line of stdout), ``error`` (last
    lines of stderr), ``late``, ``stop``: why another run ended the wait, else empty, and
    ``behind_failure``: whether that has failed.
    """

    def __init__(
        self,
        command: Sequence[str],
        variables: Mapping[str, str],
        until: str,
        others: Sequence[Mapping[str, Any]] = (),
        pause_s: float = 30.0,
        look_s: float = 5.0,
        broken_s: float = 3600.0,
        if_nothing_before: Sequence[str] = (),
    ) -> None:
        """Describe the wait.

        Args:
            command: program and arguments, without ``--wait``; empty: there is only the other runs to look at.
            variables: environment variables on top of the triggerer's.
            until: instant (ISO 8601) after which to give up; an instant, so that a restarted triggerer keeps it.
            others: other runs to look at (:meth:`dags.others.Other.of`).
            pause_s: seconds before the command is started again.
            look_s: seconds between two looks at other runs.
            broken_s: seconds for which the command may break, try after try, before people have to be told.
            if_nothing_before: arguments that the command gets besides where no earlier run is open or has failed.
        """
        super().__init__()
        self.command = list(command)
        self.variables = dict(variables)
        self.until = until
        self.others = [dict(other) for other in others]
        self.pause_s = pause_s
        self.look_s = look_s
        self.broken_s = broken_s
        self.if_nothing_before = list(if_nothing_before)
        self._broken_since: float | None = None
        self._since: dict[int, tuple[State, float]] = {}
        self._told_aside: set[tuple[int, State]] = set()

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return what Airflow keeps of the wait; the environment of the triggerer is not part of it."""
        return (
            f"{StepTrigger.__module__}.{StepTrigger.__qualname__}",
            {
                "command": self.command,
                "variables": self.variables,
                "until": self.until,
                "others": self.others,
                "pause_s": self.pause_s,
                "look_s": self.look_s,
                "broken_s": self.broken_s,
                "if_nothing_before": self.if_nothing_before,
            },
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Wait and yield one event."""
        told = ""
        while True:
            seen = await self._others()
            code, result, error, pause = EXIT_NOT_READY, None, seen.waiting, self.look_s
            began = time.monotonic()
            if not (seen.stop or seen.waiting):
                answer = await self._answer(seen)
                if answer is None:
                    continue
                (code, result, error), pause = answer, self.pause_s
            self._note(code, began)
            stop = seen.stop
            if seen.unless_ready and not seen.waiting and code == EXIT_NOT_READY:
                stop = stop or seen.stops_for(error)
            final = code in FINAL or self._broken_for() >= self.broken_s
            if stop or final or self._left() <= 0:
                late = not (stop or final)
                behind = bool(stop) and seen.behind_failure
                event = {"code": code, "result": result, "error": error, "late": late, "stop": stop}
                yield TriggerEvent({**event, "behind_failure": behind})
                return
            if error != told:
                self.log.log(logging.WARNING if self._broken_since else logging.INFO, "not yet: %s", error)
                told = error
            await asyncio.sleep(min(pause, max(self._left(), 0.0)))

    def _note(self, code: int, began: float) -> None:
        """Remember since when the command does nothing but break; one that broke after a while had gone well."""
        if code in (*FINAL, EXIT_NOT_READY):
            self._broken_since = None
        elif self._broken_since is None or time.monotonic() - began > _GOES_WELL_S:
            self._broken_since = time.monotonic()

    def _broken_for(self) -> float:
        return 0.0 if self._broken_since is None else time.monotonic() - self._broken_since

    def _left(self) -> float:
        return (datetime.fromisoformat(self.until) - datetime.now(UTC)).total_seconds()

    async def _others(self) -> Seen:
        """Look at the other runs; one that stays in a state for too long ends the wait, or is left aside meanwhile."""
        if not self.others:
            return Seen()
        from asgiref.sync import sync_to_async

        try:
            states = await sync_to_async(states_of)(self.others)
            aside = self._impatient(states)
            if isinstance(aside, Seen):
                return aside
            looked = [number for number in range(len(self.others)) if number not in aside]
            asked = [self.others[number] for number in looked]
            return await sync_to_async(look_at)(asked, [states[number] for number in looked])
        except AirflowRuntimeError as error:
            return Seen(waiting=f"Airflow does not say how other runs stand: {error}")

    def _impatient(self, states: Sequence[State]) -> set[int] | Seen:
        """Return the runs that are left aside for what they are now, or why the wait ends."""
        aside = set()
        for number, (other, state) in enumerate(zip(self.others, states, strict=True)):
            before, since = self._since.get(number, ("", 0.0))
            if state != before:
                self._since[number] = (state, since := time.monotonic())
            patience = other["patience_s"].get(state)
            if patience is None or time.monotonic() - since < patience:
                continue
            has, then = _GIVEN_UP[state]
            text = f"{name_of(other)} {has} for {patience / 60:.0f} minutes. {other['why']}"
            if other["if_failed"] == "go on":
                if (number, state) not in self._told_aside:
                    self.log.info("%s It is not waited for while it is.", text)
                    self._told_aside.add((number, state))
                aside.add(number)
            else:
                return Seen(stop=f"{text} {then}, then clear this task.")
        return aside

    async def _answer(self, before: Seen) -> tuple[int, str | None, str] | None:
        """Return what the command says; None if another run has changed what is asked meanwhile."""
        more = self.if_nothing_before if before.nothing_before else []
        if before.unless_ready:
            return await self._look(more, 0.0)
        looking = asyncio.create_task(self._look(more, max(self._left(), 0.0)))
        try:
            while True:
                done, _ = await asyncio.wait({looking}, timeout=self.look_s if self.others else None)
                if done:
                    return looking.result()
                seen = await self._others()
                if seen.stop or seen.unless_ready or seen.waiting or bool(seen.queued) != bool(before.queued):
                    return None
        finally:
            if not looking.done():
                looking.cancel()
                with suppress(asyncio.CancelledError):
                    await looking

    async def _look(self, more: Sequence[str], seconds: float) -> tuple[int, str | None, str]:
        if not self.command:
            return 0, NOTHING_AHEAD, ""
        process = await asyncio.create_subprocess_exec(
            *self.command,
            *more,
            "--wait",
            f"{seconds:.0f}",
            env={**os.environ, **self.variables},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            output, errors = await process.communicate()
        finally:
            # The task was cleared, another run ended the wait, or the triggerer ends: nobody listens any more.
            if process.returncode is None:
                process.kill()
                await process.wait()
        printed = [line.strip() for line in output.decode(errors="replace").splitlines() if line.strip()]
        noted = [line.strip() for line in errors.decode(errors="replace").splitlines() if line.strip()]
        assert process.returncode is not None
        return process.returncode, printed[-1] if printed else None, "\n".join(noted[-5:])
