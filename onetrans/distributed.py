"""The processes (*ranks*) that train one model together: what they exchange, how they are started, how they end.

Training is data-parallel.  Every rank holds the whole model and takes its share of
every batch (:class:`onetrans.loader.Share`).  Its loss is its part of the loss of
the whole batch: sums over its own rows, divided by the counts of all ranks' rows.
So gradients are added up, not averaged, and N ranks take the step that one process
takes on the same batch, to within the rounding of another order of addition.
Gradients of large embedding tables are exchanged as the rows that were touched.

The first rank *leads*: it alone writes files, reports and decides what depends on
the clock, and tells the others.  With one process nothing is exchanged and the same
code runs.

``torchrun`` starts the ranks, by hand or through ``training.processes``.  A rank
that dies takes the others with it: they notice at their next exchange, or after
``training.rank_timeout_seconds`` if it only hangs.  The next try goes on from the
last checkpoint, with as many ranks as it likes.
"""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function

from onetrans.batch import RequestBatch
from onetrans.errors import (
    EXIT_BAD_CONFIG,
    EXIT_BAD_DATA,
    EXIT_FAILED,
    EXIT_NOT_READY,
    BadConfigError,
    PipelineError,
)
from onetrans.loader import Share

logger = logging.getLogger(__name__)

T = TypeVar("T")

_NONE, _DENSE = -2, -1
"""What a rank says of a parameter that has no gradient, or a dense one; of a sparse one it says the number of rows."""
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
_WORD_S = 3.0
"""Seconds a rank waits before it ends for what another did, so that whoever watches sees that one end first."""
_PARENT_S = 1.0
_SUMMED_BYTES = 1 << 24


class RankLostError(PipelineError):
    """Another rank has died or hangs; the next try goes on from the last checkpoint."""


class RankFailedError(PipelineError):
    """A rank ended before the training did; carries the exit code of the rank that was the cause."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class RanksDifferError(PipelineError):
    """The ranks no longer hold the same weights: a fault of the machine or of the code, never of the data."""


@contextmanager
def exchanging() -> Iterator[None]:
    """Turn what the backend raises when another rank is gone into an error that says so."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise RankLostError(
            f"a process of this training lost the others ({reason}): one of them died or hangs, and what it said, if "
            "anything, stands above. Run the same command again, with as many processes as you like: it goes on from "
            "the last checkpoint"
        ) from error


@dataclass(frozen=True)
class Ranks:
    """The ranks of a training, as one of them sees them; one process alone is its own and only rank."""

    number: int = 0
    """Number of this rank, from 0."""
    count: int = 1
    """Ranks on all machines."""
    local_number: int = 0
    """Number of this rank among those of its machine, which is the number of its GPU."""
    local_count: int = 1
    """Ranks of this machine."""

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes, reports and decides."""
        return self.number == 0

    @property
    def share(self) -> Share:
        """This rank's part of every batch."""
        return Share(self.number, self.count)

    def device(self, chosen: torch.device) -> torch.device:
        """Return this rank's own device of the kind that was chosen.

        Raises:
            BadConfigError: if there are more ranks than GPUs on this machine, or all were given the same one.
        """
        if self.count == 1 or chosen.type != "cuda":
            return chosen
        if chosen.index is not None:
            raise BadConfigError(
                f"training.device = '{chosen}' names one GPU for {self.local_count} processes: say cuda"
            )
        if self.local_count > torch.cuda.device_count():
            raise BadConfigError(
                f"{self.local_count} processes on a machine where {torch.cuda.device_count()} GPUs are visible; "
                "start as many as there are GPUs"
            )
        device = torch.device("cuda", self.local_number)
        torch.cuda.set_device(device)
        return device

    # Small things, exchanged between processors

    def total(self, *values: float) -> list[float]:
        """Return the sums of some numbers over all ranks, in float64."""
        if self.count == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64)
        with exchanging():
            dist.all_reduce(numbers)
        return numbers.tolist()

    def largest(self, value: float) -> float:
        """Return the largest of the ranks' numbers."""
        if self.count == 1:
            return value
        number = torch.tensor(value, dtype=torch.float64)
        with exchanging():
            dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return float(number)

    def decide(self, decision: Callable[[], T]) -> T:
        """Return what the leading rank decided, on every rank; the others do not call ``decision``.

        What was decided is plain data.  If the leading rank fails, it raises its error and the others end quietly with
        its exit code.
        """
        if self.count == 1:
            return decision()
        told: list[Any] = [None, None]
        failure: Exception | None = None
        if self.leads:
            try:
                told = [decision(), None]
            except Exception as error:
                failure, told = error, [None, getattr(error, "exit_code", EXIT_FAILED)]
        with exchanging():
            dist.broadcast_object_list(told, src=0, device=torch.device("cpu"))
        if failure is not None:
            raise failure
        if told[1] is not None:
            time.sleep(_WORD_S)
            raise SystemExit(told[1])
        return told[0]

    def tell(self, text: str) -> list[str]:
        """Return the texts of all ranks, in their order, on every rank."""
        if self.count == 1:
            return [text]
        told: list[Any] = [""] * self.count
        with exchanging():
            dist.all_gather_object(told, text)
        return told

    def gather(self, parts: Sequence[pa.Table]) -> pa.Table | None:
        """Return the rows of all ranks' shares on the leading rank, None on the others.

        ``parts`` holds a table per batch.  The batches follow one another, and in each the shares in the ranks' order:
        the stored order, where the batches were not shuffled.
        """
        if self.count == 1:
            return pa.concat_tables(parts)
        sink = io.BytesIO()
        with pa.ipc.new_stream(sink, parts[0].schema) as stream:
            for part in parts:
                stream.write_table(part.combine_chunks())
        own = torch.frombuffer(bytearray(sink.getvalue()), dtype=torch.uint8)
        sizes = self._gathered(torch.tensor([own.numel(), *(part.num_rows for part in parts)]))
        padded = own.new_zeros(int(sizes[:, 0].max()))
        padded[: own.numel()] = own
        received = [torch.empty_like(padded) for _ in range(self.count)] if self.leads else None
        with exchanging():
            dist.gather(padded, received, dst=0)
        if received is None:
            return None
        tables = [
            pa.ipc.open_stream(pa.py_buffer(content[: int(size)].numpy())).read_all()
            for content, size in zip(received, sizes[:, 0], strict=True)
        ]
        ends = sizes[:, 1:].cumsum(1)
        return pa.concat_tables(
            tables[rank].slice(int(ends[rank, batch] - sizes[rank, 1 + batch]), int(sizes[rank, 1 + batch]))
            for batch in range(len(parts))
            for rank in range(self.count)
        )

    def looked_up_by_all(self, batch: RequestBatch) -> RequestBatch:
        """Return the embedding rows and times of all ranks' shares, for counting; other parts are this rank's own."""
        if self.count == 1:
            return batch
        return replace(
            batch,
            user_RU=self._joined(batch.user_RU),
            context_RK=self._joined(batch.context_RK),
            item_NI=self._joined(batch.item_NI),
            event_EV=self._joined(batch.event_EV),
            request_time_R=self._joined(batch.request_time_R),
        )

    def _joined(self, part: Tensor) -> Tensor:
        counts = self._gathered(torch.tensor([part.shape[0]])).view(-1).tolist()
        padded = part.new_zeros((max(counts), *part.shape[1:]))
        padded[: part.shape[0]] = part
        return torch.cat([own[:count] for own, count in zip(self._gathered(padded), counts, strict=True)])

    # Gradients and weights, exchanged between devices

    @torch.no_grad()
    def add_up_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by the sum over all ranks.

        A parameter that has a gradient on some ranks only, because the others' shares did not reach it, gets the sum of
        those; one that has none anywhere keeps none, as in one process.
        """
        if self.count == 1:
            return
        for parameter in parameters:
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = parameter.grad.coalesce()
        states = self._gathered(torch.tensor([_state(parameter) for parameter in parameters]))
        kinds = states.max(0).values.tolist()
        self._add_up_dense([p for p, kind in zip(parameters, kinds, strict=True) if kind == _DENSE])
        for number, (parameter, kind) in enumerate(zip(parameters, kinds, strict=True)):
            if kind >= 0:
                self._add_up_rows(parameter, states[:, number].clamp(min=0).tolist())

    @staticmethod
    def _add_up_dense(parameters: list[nn.Parameter]) -> None:
        if not parameters:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
        # One exchange: many small ones would cost more in calls than in bytes.
        together = torch.cat([gradient.reshape(-1) for gradient in gradients])
        with exchanging():
            dist.all_reduce(together)
        pieces = together.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(pieces, gradients, strict=True)])

    def _add_up_rows(self, parameter: nn.Parameter, counts: list[int]) -> None:
        """Exchange the rows of a sparse gradient; all ranks add them up in the same order, so to the same bits."""
        longest, width = max(counts), parameter.shape[1]
        rows = torch.zeros(longest, dtype=torch.int64, device=parameter.device)
        values = torch.zeros(longest, width, dtype=parameter.dtype, device=parameter.device)
        if parameter.grad is not None:
            own = counts[self.number]
            rows[:own], values[:own] = parameter.grad.indices()[0], parameter.grad.values()
        every_rows, every_values = self._gathered(rows), self._gathered(values)
        parameter.grad = torch.sparse_coo_tensor(
            torch.cat([r[:count] for r, count in zip(every_rows, counts, strict=True)])[None],
            torch.cat([v[:count] for v, count in zip(every_values, counts, strict=True)]),
            parameter.shape,
        )

    def check_same(self, tensors: Mapping[str, Tensor]) -> None:
        """Compare tensors of the same names over the ranks, bit for bit by a sum of their bits.

        Raises:
            RanksDifferError: naming one that differs; going on would train as many models as there are ranks.
        """
        if self.count == 1:
            return
        names = sorted(tensors)
        digests = self._gathered(torch.tensor([_sum_of_bits(tensors[name].detach()) for name in names]))
        differs = (digests != digests[0]).any(0)
        if differs.any():
            bad = [name for name, wrong in zip(names, differs.tolist(), strict=True) if wrong]
            raise RanksDifferError(
                f"{len(bad)} of {len(names)} tensors differ between the {self.count} processes of this training, for "
                f"example {bad[0]}; the checkpoint on disk is from before, run the same command again"
            )

    def _gathered(self, tensor: Tensor) -> Tensor:
        """Return one tensor of each rank, stacked."""
        every = [torch.empty_like(tensor) for _ in range(self.count)]
        with exchanging():
            dist.all_gather(every, tensor)
        return torch.stack(every)


def _sum_of_bits(tensor: Tensor) -> int:
    """Return the sum of a tensor's bytes, in pieces: on a CPU torch makes wide copies of what it adds up."""
    bits = tensor.contiguous().view(-1).view(torch.uint8)
    return sum(int(piece.sum(dtype=torch.int64)) for piece in bits.split(_SUMMED_BYTES))


def _state(parameter: nn.Parameter) -> int:
    if parameter.grad is None:
        return _NONE
    return parameter.grad.values().shape[0] if parameter.grad.is_sparse else _DENSE


def sum_over_ranks(x: Tensor) -> Tensor:
    """Return the sum of ``x`` over all ranks; its gradient is the sum of the ranks' gradients."""
    return _Sum.apply(x)


class _Sum(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _summed(x)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return _summed(slope)


def _summed(x: Tensor) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    with exchanging():
        dist.all_reduce(total)
    return total


# Being a rank


def is_rank(environ: Mapping[str, str] | None = None) -> bool:
    """Tell whether this process was started as one of several, by ``torchrun`` or anything that sets its variables."""
    environ = os.environ if environ is None else environ
    return "RANK" in environ and int(environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def open_ranks(device: torch.device, timeout_s: float) -> Iterator[Ranks]:
    """Join the other ranks, if there are any, and leave them at the end.

    Args:
        device: what the models are computed on: tensors of a GPU are exchanged by NCCL, all others by Gloo.
        timeout_s: seconds without a word from the others after which this rank gives up.
    """
    if not is_rank():
        yield Ranks()
        return
    ranks = Ranks(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))
    if not ranks.leads:
        logging.getLogger().setLevel(logging.ERROR)
    _end_with_parent()
    with exchanging():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout_s)
        )
    logger.info("%d processes train together, %d of them on this machine", ranks.count, ranks.local_count)
    try:
        yield ranks
    except Exception as error:
        _leave_word(error)
        if isinstance(error, RankLostError):
            time.sleep(_WORD_S)
        raise
    dist.destroy_process_group()


def _leave_word(error: Exception) -> None:
    """Write what went wrong where ``torchrun`` looks for it, so that its summary says more than an exit code."""
    path = os.environ.get(_ERROR_FILE)
    if path:
        text = f"{type(error).__name__}: {error}"
        extra = {"py_callstack": "", "timestamp": str(int(time.time()))}
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": text, "extraInfo": extra}}, file)


def _end_with_parent() -> None:
    """End this process soon after the one that started it, which leaves its ranks behind when it is killed."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_S)
        print("RankLostError: the process that started this rank is gone", file=sys.stderr, flush=True)
        os._exit(EXIT_FAILED)

    threading.Thread(target=watch, name="parent", daemon=True).start()


# Starting ranks


def launch(processes: int, module: str, arguments: Sequence[str]) -> int:
    """Run ``python -m MODULE ARGUMENTS`` as ranks on this machine, as ``torchrun --standalone`` does, and return 0.

    Raises:
        RankFailedError: if one of them failed; the others were ended.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # All ranks are on this machine, whose own name may have no address, and nobody else is to reach them.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", module, *arguments)
    except ChildFailedError as error:
        raise _cause(error.failures, processes) from None
    except SignalException as error:
        name = signal.Signals(error.sigval).name
        raise RankFailedError(
            f"asked to end by {name}; the processes were asked too, and saved a checkpoint where they had the time; "
            "run the same command to go on",
            EXIT_FAILED,
        ) from None
    return 0


def _cause(failures: Mapping[int, Any], processes: int) -> RankFailedError:
    """Return the error of the rank that was the cause; others may have ended within the same moment because of it."""

    def order(item: tuple[int, Any]) -> tuple[bool, bool, float, int]:
        rank, failure = item
        word = _word(failure)
        lost = word.startswith(f"{RankLostError.__name__}:") or failure.exitcode == -signal.SIGTERM
        return lost, not word and failure.exitcode > 0, failure.timestamp, rank

    rank, failure = min(failures.items(), key=order)
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        hint = " (the system does this when memory runs out)" if failure.exitcode == -signal.SIGKILL else ""
        text = (
            f"process {rank} of {processes} was ended by {name}{hint}, and the others with it. Run the same command "
            "again, with as many processes as you like: it goes on from the last checkpoint"
        )
        return RankFailedError(text, EXIT_FAILED)
    known = failure.exitcode in (EXIT_BAD_DATA, EXIT_NOT_READY, EXIT_BAD_CONFIG)
    word = _word(failure) or f"ended with exit code {failure.exitcode}; what it said is above"
    return RankFailedError(f"process {rank} of {processes}: {word}", failure.exitcode if known else EXIT_FAILED)


def _word(failure: Any) -> str:
    """Return what a rank left word of, see :func:`_leave_word`; empty if it did not."""
    if not failure.error_file or not os.path.isfile(failure.error_file):
        return ""
    message = failure.message
    return str(message["message"] if isinstance(message, Mapping) else message)
