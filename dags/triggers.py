"""A wait that holds no worker: the triggerer runs a step's process now and then until it has an answer."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from airflow.triggers.base import BaseTrigger, TriggerEvent


class StepTrigger(BaseTrigger):
    """Runs a command every so often until its exit code is final, or it is too late.

    The event holds ``code``, ``result`` (last line of stdout), ``error`` (last
    lines of stderr) and ``late``.
    """

    def __init__(
        self,
        command: Sequence[str],
        variables: Mapping[str, str],
        every_s: float,
        until: str,
        final_codes: Sequence[int],
    ) -> None:
        """Describe the wait.

        Args:
            command: program and arguments.
            variables: environment variables on top of the triggerer's.
            every_s: seconds between two runs.
            until: instant (ISO 8601) after which to give up; an instant, so that a restarted triggerer keeps it.
            final_codes: exit codes that end the wait.
        """
        super().__init__()
        self.command = list(command)
        self.variables = dict(variables)
        self.every_s = every_s
        self.until = until
        self.final_codes = list(final_codes)

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return what Airflow keeps of the wait; the environment of the triggerer is not part of it."""
        return (
            f"{StepTrigger.__module__}.{StepTrigger.__qualname__}",
            {
                "command": self.command,
                "variables": self.variables,
                "every_s": self.every_s,
                "until": self.until,
                "final_codes": self.final_codes,
            },
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Wait, run, and so on; yield one event."""
        deadline = datetime.fromisoformat(self.until)
        while True:
            await asyncio.sleep(self.every_s)
            code, result, error = await self._look()
            late = datetime.now(UTC) >= deadline
            if code in self.final_codes or late:
                final = code in self.final_codes
                yield TriggerEvent({"code": code, "result": result, "error": error, "late": late and not final})
                return
            self.log.info("not ready yet (exit code %s): %s", code, error)

    async def _look(self) -> tuple[int, str | None, str]:
        process = await asyncio.create_subprocess_exec(
            *self.command,
            env={**os.environ, **self.variables},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            output, errors = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
        printed = [line.strip() for line in output.decode(errors="replace").splitlines() if line.strip()]
        noted = [line.strip() for line in errors.decode(errors="replace").splitlines() if line.strip()]
        return process.returncode or 0, printed[-1] if printed else None, "\n".join(noted[-5:])
