"""Embedding tables divided row by row over the ranks, by TorchRec: for tables too large for one device.

Each rank holds a stretch of the rows of such a table, and their Adagrad sums.  Before
a step it fetches the rows its share of the batch touches, each once, from whoever
holds them; the model looks them up as in a small table of its own.  After the
backward pass the gradients of these rows go back, are added up where the rows are
held, and the update happens there (FBGEMM's fused exact Adagrad, the rule of
:class:`torch.optim.Adagrad`).

A checkpoint or a saved model knows nothing of this: it is made of whole tables,
joined on the leading rank, and is what one process would have written.

One thing differs.  The norm that table gradients are clipped by is taken before
the ranks' gradients of a row are added up, as the sum of the ranks' norms, because
the exact one would need the added rows before the update.  It is at least the exact norm
(triangle inequality), so gradients within the limit by it are never clipped by
either, and beyond it are scaled down more than they had to be.

TorchRec is an extra of this package (docs/scale.md) and imported only here.

Shape suffixes: Y  rows of a table     X  rows fetched     D  embedding width
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from onetrans.batch import RequestBatch
from onetrans.distributed import Ranks, exchanging
from onetrans.errors import BadConfigError
from onetrans.models import RankingModel, build_model
from onetrans.models.embeddings import TABLE, Fetched
from onetrans.optim import Optimizers
from onetrans.schema import FeatureSchema

_ADAGRAD_EPS = 1e-10
"""Of :class:`torch.optim.Adagrad`, whose default the tables of one process are trained with."""

_WIDTH_MULTIPLE = 4
"""FBGEMM's rows are whole vectors of so many numbers."""


def tables_to_shard(schema: FeatureSchema, from_rows: int, ranks: Ranks) -> list[str]:
    """Return the tables that are divided: those of at least so many rows, if there is more than one rank; 0: none."""
    if not from_rows or ranks.count == 1:
        return []
    return [name for name, rows in schema.embedding_tables().items() if rows >= from_rows]


class _Shard(NamedTuple):
    """The rows of one table that this rank holds."""

    first: int
    """Number of the first of them."""
    rows_YD: Tensor
    """The rows, updated in place by the backward pass."""
    sums_YD: Tensor
    """Their Adagrad sums, likewise."""


class ShardedTables:
    """Some tables of a model, divided over the ranks."""

    def __init__(
        self, model: RankingModel, optimizers: Optimizers, names: list[str], ranks: Ranks, device: torch.device
    ):
        """Take over tables and their Adagrad sums from a model and its optimizers; both still hold them afterwards.

        Raises:
            BadConfigError: if TorchRec is not installed, or cannot hold rows of this width.
        """
        width = model.embeddings.width
        if width % _WIDTH_MULTIPLE:
            raise BadConfigError(
                f"training.shard_rows: TorchRec divides tables whose width is a multiple of {_WIDTH_MULTIPLE}, "
                f"the model's is {width}"
            )
        if model.embeddings.usage is not None:
            raise BadConfigError(
                "training.shard_rows does not go with training.admit_after or training.evict_after_days: the uses of "
                "rows are counted where whole tables are held"
            )
        if importlib.util.find_spec("torchrec") is None:
            raise BadConfigError(
                "training.shard_rows needs TorchRec, which is not installed: run `make torchrec` in a checkout without "
                "a GPU, `pip install --editable '.[torchrec]'` in one with, or build the image `training` with "
                "`--build-arg PACKAGES=training-torchrec.txt`"
            )
        self.names, self.ranks, self.device, self.width = names, ranks, device, width
        self._embeddings = model.embeddings
        self._rows = {name: model.embeddings.table(name).shape[0] for name in names}
        self._columns = _columns(model.schema, names)
        self._collection, self._jagged = _divided_collection(self._rows, width, ranks, device, optimizers)
        self._shards = _shards(self._collection, names)
        for name, shard in self._shards.items():
            table = model.embeddings.table(name)
            held = slice(shard.first, shard.first + shard.rows_YD.shape[0])
            shard.rows_YD.copy_(table.detach()[held])
            shard.sums_YD.copy_(optimizers.embedding.state[table]["sum"][held])
        self._given: list[Tensor] = []
        self._leaves: list[Tensor] = []

    def fetch(self, batch: RequestBatch) -> None:
        """Bring the rows that a batch touches to this rank, where the model's lookups find them; every rank must."""
        graded = torch.is_grad_enabled()
        # On a CPU FBGEMM's lookup exists with a gradient only, and inference mode has none.
        with torch.inference_mode(False), torch.set_grad_enabled(graded):
            rows = [self._touched(batch, name) for name in self.names]
            lengths = torch.tensor([row_X.shape[0] for row_X in rows], device=self.device)
            with exchanging():
                found = self._collection(self._jagged(self.names, torch.cat(rows), lengths))
                self._given = [found[name].values() for name in self.names]
            self._leaves = [given_XD.detach().requires_grad_(graded) for given_XD in self._given]
        self._embeddings.fetched = {
            name: Fetched(row_X, leaf_XD) for name, row_X, leaf_XD in zip(self.names, rows, self._leaves, strict=True)
        }

    def _touched(self, batch: RequestBatch, name: str) -> Tensor:
        sides = {"user": batch.user_RU, "context": batch.context_RK, "item": batch.item_NI, "event": batch.event_EV}
        return torch.unique(torch.cat([sides[side][:, column] for side, column in self._columns[name]]))

    def norm_bound(self) -> float:
        """Return a number that the norm of all ranks' gradients of these tables does not exceed."""
        squares = sum(float(leaf.grad.square().sum()) for leaf in self._leaves if leaf.grad is not None)
        return self.ranks.total(math.sqrt(squares))[0]

    def update(self, scale: float) -> None:
        """Send the gradients, times ``scale``, to the ranks that hold the rows, which update them."""
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad * scale for leaf in self._leaves]
        with exchanging():
            torch.autograd.backward(self._given, gradients)
        self._given, self._leaves = [], []
        self._embeddings.fetched = {}

    def joined(self) -> dict[str, tuple[Tensor, Tensor]] | None:
        """Return each whole table and its Adagrad sums, on the CPU, on the leading rank; None on the others."""
        whole: dict[str, tuple[Tensor, Tensor]] = {}
        for name, shard in self._shards.items():
            rows, sums = (self._join(name, shard.first, part) for part in (shard.rows_YD, shard.sums_YD))
            if rows is not None and sums is not None:
                whole[name] = rows, sums
        return whole if self.ranks.leads else None

    def _join(self, name: str, first: int, part_YD: Tensor) -> Tensor | None:
        # Row-wise shards are all of one size but the last, which may be smaller, and those after it, which are empty.
        size = -(-self._rows[name] // self.ranks.count)
        own_YD = torch.zeros(size, self.width)
        own_YD[: part_YD.shape[0]] = part_YD.cpu()
        received = [torch.empty_like(own_YD) for _ in range(self.ranks.count)] if self.ranks.leads else None
        with exchanging():
            dist.gather(own_YD, received, dst=0)
        return None if received is None else torch.cat(received)[: self._rows[name]]


def _columns(schema: FeatureSchema, names: list[str]) -> dict[str, list[tuple[str, int]]]:
    """Return, for each table, the side and column of the batch's rows that are looked up in it."""
    found: dict[str, list[tuple[str, int]]] = {name: [] for name in names}
    for side in ("user", "context", "item", "event"):
        for column, feature in enumerate(schema.of_side(side)):
            if feature.embedding in found:
                found[feature.embedding].append((side, column))
    return found


def _divided_collection(
    rows: Mapping[str, int], width: int, ranks: Ranks, device: torch.device, optimizers: Optimizers
) -> tuple[Any, Any]:
    """Return TorchRec's collection of these tables, and what makes its input of names, row numbers and lengths."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
    from torchrec.distributed.comm_ops import set_gradient_division
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
    from torchrec.distributed.types import ShardingEnv

    # Each rank's loss is divided by the counts of the whole batch already, so gradients are added up, not averaged.
    set_gradient_division(False)
    collection = EmbeddingCollection(
        tables=[
            EmbeddingConfig(num_embeddings=count, embedding_dim=width, name=name, feature_names=[name])
            for name, count in rows.items()
        ],
        device=torch.device("meta"),
    )
    sharder = EmbeddingCollectionSharder(
        fused_params={
            "optimizer": EmbOptimType.EXACT_ADAGRAD,
            "learning_rate": optimizers.config.embedding_lr,
            "eps": _ADAGRAD_EPS,
        }
    )
    plan = construct_module_sharding_plan(
        collection,
        {name: row_wise(compute_kernel="fused") for name in rows},
        sharder=sharder,
        local_size=ranks.local_count,
        world_size=ranks.count,
        device_type=device.type,
    )
    group = dist.group.WORLD
    assert group is not None, "several ranks have joined"
    with exchanging():
        divided = sharder.shard(collection, plan, ShardingEnv.from_process_group(group), device)
    return divided, KeyedJaggedTensor.from_lengths_sync


def _shards(collection: Any, names: list[str]) -> dict[str, _Shard]:
    weights, sums = collection.state_dict(), collection.fused_optimizer.state_dict()["state"]
    found = {}
    for name in names:
        key = f"embeddings.{name}.weight"
        (held,) = weights[key].local_shards()
        (kept,) = sums[key][f"{name}.momentum1"].local_shards()
        found[name] = _Shard(held.metadata.shard_offsets[0], held.tensor, kept.tensor)
    return found


def shard(
    model: RankingModel, optimizers: Optimizers, names: list[str], ranks: Ranks, device: torch.device
) -> tuple[Optimizers, ShardedTables]:
    """Divide some tables of a model over the ranks and move the rest to ``device``; return what updates it from now on.

    Every rank gives the same model and state; until then each holds the whole tables, in the memory of its machine.

    Raises:
        BadConfigError: if TorchRec is not installed, or cannot hold rows of this width.
    """
    tables = ShardedTables(model, optimizers, names, ranks, device)
    sums = {name: optimizers.embedding.state[p] for name, p in model.embedding_parameters().items()}
    dense = optimizers.dense.state_dict()
    for name in names:
        delattr(model.embeddings, TABLE + name)
    model.to(device)
    remaining = Optimizers(model, optimizers.config)
    _take_over(remaining, optimizers.steps, dense, model, sums)
    remaining.sharded = tables
    model.register_forward_pre_hook(lambda _, given: tables.fetch(given[0]))
    return remaining, tables


def whole(model: RankingModel, optimizers: Optimizers, tables: ShardedTables) -> tuple[RankingModel, Optimizers] | None:
    """Return a model of whole tables and its optimizers, on the CPU, where the process leads; every rank must ask."""
    joined = tables.joined()
    if joined is None:
        return None
    with torch.random.fork_rng(devices=[]):
        copy = build_model(model.config, model.schema)
    copy.load_state_dict({**model.state_dict(), **{_parameter(name): rows for name, (rows, _) in joined.items()}})
    copy.compute = model.compute
    state = {name: optimizers.embedding.state[p] for name, p in model.embedding_parameters().items()}
    steps = torch.tensor(float(optimizers.steps))
    state |= {_parameter(name): {"step": steps, "sum": sums} for name, (_, sums) in joined.items()}
    restored = Optimizers(copy, optimizers.config)
    _take_over(restored, optimizers.steps, optimizers.dense.state_dict(), copy, state)
    return copy.train(model.training), restored


def _take_over(
    optimizers: Optimizers,
    steps: int,
    dense: dict[str, Any],
    model: RankingModel,
    sums: Mapping[str, Mapping[str, Any]],
) -> None:
    """Put the state of other optimizers into these, that of the tables by name: there are more or fewer of them."""
    state = optimizers.state_dict()
    by_number = {number: dict(sums[name]) for number, name in enumerate(model.embedding_parameters())}
    embedding = {**state["embedding"], "state": by_number}
    optimizers.load_state_dict({**state, "steps": steps, "dense": dense, "embedding": embedding})


def _parameter(table: str) -> str:
    return f"embeddings.{TABLE}{table}"
