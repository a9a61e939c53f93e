"""A wait that holds no worker: the triggerer keeps one process that looks until it has an answer."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from airflow.triggers.base import BaseTrigger, TriggerEvent


class StepTrigger(BaseTrigger):
    """Runs a waiting command until its exit code is final, or it is too late.

    The command gets ``--wait SECONDS`` with the time that is left.  If it ends
    with any other code (a catalog that does not answer), it is started again
    after a pause.  The event holds ``code``, ``result`` (last line of stdout),
    ``error`` (last lines of stderr) and ``late``.
    """

    def __init__(
        self,
        command: Sequence[str],
        variables: Mapping[str, str],
        until: str,
        final_codes: Sequence[int],
        pause_s: float = 30.0,
    ) -> None:
        """Describe the wait.

        Args:
            command: program and arguments, without ``--wait``.
            variables: environment variables on top of the triggerer's.
            until: instant (ISO 8601) after which to give up; an instant, so that a restarted triggerer keeps it.
            final_codes: exit codes that end the wait.
            pause_s: seconds before the command is started again.
        """
        super().__init__()
        self.command = list(command)
        self.variables = dict(variables)
        self.until = until
        self.final_codes = list(final_codes)
        self.pause_s = pause_s

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return what Airflow keeps of the wait; the environment of the triggerer is not part of it."""
        return (
            f"{StepTrigger.__module__}.{StepTrigger.__qualname__}",
            {
                "command": self.command,
                "variables": self.variables,
                "until": self.until,
                "final_codes": self.final_codes,
                "pause_s": self.pause_s,
            },
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Wait and yield one event."""
        while True:
            code, result, error = await self._look(max(self._left(), 0.0))
            final = code in self.final_codes
            if final or self._left() <= 0:
                yield TriggerEvent({"code": code, "result": result, "error": error, "late": not final})
                return
            self.log.info("no answer yet (exit code %s): %s", code, error)
            await asyncio.sleep(min(self.pause_s, max(self._left(), 0.0)))

    def _left(self) -> float:
        return (datetime.fromisoformat(self.until) - datetime.now(UTC)).total_seconds()

    async def _look(self, seconds: float) -> tuple[int, str | None, str]:
        process = await asyncio.create_subprocess_exec(
            *self.command,
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
            # The task was cleared, or the triggerer ends: nobody listens any more.
            if process.returncode is None:
                process.kill()
        printed = [line.strip() for line in output.decode(errors="replace").splitlines() if line.strip()]
        noted = [line.strip() for line in errors.decode(errors="replace").splitlines() if line.strip()]
        assert process.returncode is not None
        return process.returncode, printed[-1] if printed else None, "\n".join(noted[-5:])
