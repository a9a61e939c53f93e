"""Commands that are killed by SIGKILL at a chosen moment of their work: the n-th time they come to some kind of point.

A process kills itself at the point, which ends it as the system would: at once,
nothing is flushed, closed or undone.  The points lie within what a training does:

    forward      before the forward pass of a step
    scored       after rows were scored with a model in evaluation mode
    step         after the gradients, before the optimizers' step
    stepped      after that step
    open         before a file is opened to be written
    block        after a part of a file was written
    close        when all is written, before the file is shown
    shown        after that
    delete       before a file is deleted

A file's points carry its kind of name too (``block checkpoint.json``).
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

PROCESSES = multiprocessing.get_context("forkserver")
# What a training imports on its way, and a test's process besides: a try then begins soon.
PROCESSES.set_forkserver_preload(
    ["onetrans.cli", "onetrans.commands.config", "onetrans.models.dcnv2_din", "onetrans.models.onetrans",
     "onetrans.next_batch", "onetrans.plain_runs", "pandas", "pyarrow.dataset", "pytest", "sympy", "torch._dynamo"]
)  # fmt: skip

BOUND_S = 240


def run(
    command: list[str], environment: Mapping[str, str], kill_at: tuple[str, int] | None = None
) -> tuple[int | None, dict[str, int]]:
    """Run a command in a process of its own; return its exit code, negative for a signal, and how often it came where.

    Args:
        command: arguments of ``onetrans``.
        environment: variables set for it besides those of this process, which may be newer than the server that forks.
        kill_at: a kind of point, and which one of that kind; None: it is not killed.
    """
    mine, theirs = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_watched, args=(command, {**os.environ, **environment}, kill_at, theirs))
    process.start()
    theirs.close()
    process.join(BOUND_S)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"{command} did not end in {BOUND_S} s")
    try:
        counts: dict[str, int] = mine.recv()
    except EOFError:  # It was killed.
        counts = {}
    return process.exitcode, counts


def _watched(command: list[str], environment: Mapping[str, str], kill_at: tuple[str, int] | None, told: Any) -> None:
    os.environ.update(environment)
    counts: dict[str, int] = {}
    watch(counts, kill_at)
    from onetrans.cli import main

    code = main(command)
    told.send(counts)
    raise SystemExit(code)


def watch(counts: dict[str, int], kill_at: tuple[str, int] | None) -> None:
    """Count how often this process comes to each point, and kill it at one of them."""
    from onetrans import storage
    from onetrans.models import DCNv2DIN, OneTrans
    from onetrans.optim import Optimizers

    def point(*names: str) -> None:
        for name in names:
            counts[name] = counts.get(name, 0) + 1
            if kill_at == (name, counts[name]):
                os.kill(os.getpid(), signal.SIGKILL)

    def around(owner: Any, method: str, names: Callable[[Any], tuple[str, str]]) -> None:
        original = getattr(owner, method)

        def told(first: Any, *arguments: Any, **named: Any) -> Any:
            before, after = names(first)
            point(before)
            result = original(first, *arguments, **named)
            point(after)
            return result

        setattr(owner, method, told)

    for model in (OneTrans, DCNv2DIN):
        around(model, "forward", lambda model: ("forward", "") if model.training else ("", "scored"))
    around(Optimizers, "step", lambda _: ("step", "stepped"))
    around(storage, "delete_file", lambda _: ("delete", ""))
    original = storage.writing

    @contextmanager
    def writing(path: str) -> Iterator[Any]:
        kind = re.sub(r"-[-0-9a-f]+\.", ".", path.rsplit("/", 1)[1])
        point("open", f"open {kind}")
        with original(path) as stream:
            yield _Stream(stream, lambda: point("block", f"block {kind}"))
            point("close", f"close {kind}")
        point("shown", f"shown {kind}")

    storage.writing = writing


class _Stream:
    def __init__(self, stream: Any, written: Callable[[], None]) -> None:
        self._stream, self._written = stream, written

    def write(self, content: Any) -> None:
        self._stream.write(content)
        self._written()
