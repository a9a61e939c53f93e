"""What a training watches besides its loss: that its weights move, and which feature made it leave the numbers.

Both look at the rows of a table that a batch touches, never at the whole table:
their time and memory do not depend on how large it is.

Shape suffixes: those of :mod:`onetrans.batch`, and

    M  rows looked up (requests, candidates or events)     F  features of one side     X  numbers of vectors
    D  embedding width
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from onetrans.batch import RequestBatch
from onetrans.models import RankingModel, Scores
from onetrans.models.embeddings import MAP, SPARSE_FROM_NUMBERS, TABLE
from onetrans.schema import Feature, Side


class UnmovedWeights:
    """Which weight tensors no step has changed yet.

    A large table is compared in the rows of one step's gradient, copied before that step; anything else with a copy
    of the whole.  A tensor that has moved once is not looked at again.
    """

    def __init__(self, model: nn.Module) -> None:
        """Remember all weights as they are."""
        self._parameters = dict(model.named_parameters())
        self.total = len(self._parameters)
        self._names = set(self._parameters)
        self._copies = {n: p.detach().clone() for n, p in self._parameters.items() if p.numel() < SPARSE_FROM_NUMBERS}
        self._rows: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def names(self) -> list[str]:
        """Names of the tensors that have not moved, sorted."""
        return sorted(self._names)

    def before_step(self) -> None:
        """Copy the rows that the gradients are about to change, of large tables that have not moved yet."""
        for name in self._names - self._copies.keys():
            gradient = self._parameters[name].grad
            if gradient is None:
                continue
            if gradient.is_sparse:
                # Uncoalesced indices repeat rows, which does no harm here.
                rows = gradient._indices()[0]
                self._rows[name] = (rows, self._parameters[name].detach()[rows])
            else:
                self._copies[name] = self._parameters[name].detach().clone()

    def after_step(self) -> None:
        """Forget the tensors that have moved."""
        moved = [n for n, start in self._copies.items() if not torch.equal(start, self._parameters[n])]
        moved += [n for n, (rows, start) in self._rows.items() if not torch.equal(start, self._parameters[n][rows])]
        self._rows.clear()
        for name in moved:
            self._names.discard(name)
            self._copies.pop(name, None)


@torch.no_grad()
def blame(model: RankingModel, batch: RequestBatch, scores: Scores | None = None) -> str:
    """Say in words what in a batch or a model is not finite: a feature with its table and row, or a weight.

    The text is empty where all that went into the step is finite.

    Args:
        model: with the weights of the failed step; gradients, if there are any, are looked at too.
        batch: what the step was computed on.
        scores: of the batch, if they were computed.
    """
    found = _bad_row(model, batch) or _bad_vector(model, batch)
    if found:
        return found
    dense = model.dense_parameters()
    weights = [name for name, p in dense.items() if not p.isfinite().all()]
    if weights:
        return f"{len(weights)} of {len(dense)} weight tensors are not finite, the first is {weights[0]}"
    return _bad_gradient(model, batch) or ("" if scores is None else _bad_score(model, batch, scores))


def _bad_row(model: RankingModel, batch: RequestBatch) -> str:
    for feature, rows_M in _looked_up(model, batch):
        bad_M = ~model.embeddings.rows(feature.embedding, rows_M).isfinite().all(dim=1)
        if bad_M.any():
            row = int(rows_M[bad_M][0])
            times = int((rows_M == row).sum())
            return (
                f"row {row} of table {feature.embedding}, which feature {feature.name} looks up {times} times in the "
                "batch, is not finite"
            )
    return ""


def _bad_vector(model: RankingModel, batch: RequestBatch) -> str:
    sides: tuple[tuple[Side, Tensor | None], ...] = (
        ("user", batch.user_vector_RX), ("context", batch.context_vector_RX), ("item", batch.item_vector_NX),
    )  # fmt: skip
    for side, numbers_MX in sides:
        if numbers_MX is None:
            continue
        features = model.schema.vectors(side)
        for feature, part_MD in zip(features, numbers_MX.split([f.dim for f in features], dim=1), strict=True):
            bad = int((~part_MD.isfinite().all(dim=1)).sum())
            if bad:
                return f"{bad} values of feature {feature.name} are not finite"
    return ""


def _bad_gradient(model: RankingModel, batch: RequestBatch) -> str:
    gradients = {name: p.grad for name, p in model.named_parameters()}
    elsewhere = {_parameter(table): fetched.values_YD.grad for table, fetched in model.embeddings.fetched.items()}
    bad = [name for name, gradient in {**gradients, **elsewhere}.items() if not _finite(gradient)]
    if not bad:
        return ""
    readers: dict[str, list[str]] = {}
    for feature, _ in _looked_up(model, batch):
        readers.setdefault(_parameter(feature.embedding), []).append(feature.name)
    named = [" and ".join(readers[name]) for name in bad if name in readers]
    what = f", among them that of feature {named[0]}" if named else ""
    total = len(gradients) + len(elsewhere)
    return f"{len(bad)} of {total} gradients are not finite{what}; the first is of {bad[0]}"


def _bad_score(model: RankingModel, batch: RequestBatch, scores: Scores) -> str:
    for task, logit_N in zip(("CTR", "CVR"), scores, strict=True):
        bad_N = ~logit_N.isfinite()
        if bad_N.any():
            candidate = int(bad_N.nonzero()[0])
            request = int(batch.candidate_request_N[candidate])
            return (
                f"weights and input are finite, {int(bad_N.sum())} {task} scores are not, the first of candidate "
                f"{candidate} (request {request}) of the batch; {largest_embedding(model, batch)}"
            )
    return ""


@torch.no_grad()
def largest_embedding(model: RankingModel, batch: RequestBatch) -> str:
    """Name the feature with the largest embedding of the batch: where a table that runs away is seen first."""
    sizes = {
        feature.name: float(model.embeddings.rows(feature.embedding, rows_M).abs().max())
        for feature, rows_M in _looked_up(model, batch)
        if rows_M.shape[0]
    }
    if not sizes:
        return "nothing was looked up"
    name = max(sizes, key=lambda feature: sizes[feature])
    return f"the largest embedding, {sizes[name]:.3g}, is of feature {name}"


def looked_up_in(model: RankingModel, parameters: Iterable[str]) -> list[str]:
    """Return the names of the features that look up in some of a model's parameters, in the schema's order."""
    named = set(parameters)
    return [
        f.name for f in model.schema.features if _parameter(f.embedding, MAP if f.kind == "vector" else TABLE) in named
    ]


def _looked_up(model: RankingModel, batch: RequestBatch) -> Iterator[tuple[Feature, Tensor]]:
    """Yield each feature and the rows of its table that the batch looks up."""
    sides: tuple[tuple[Side, Tensor], ...] = (
        ("user", batch.user_RU), ("context", batch.context_RK), ("item", batch.item_NI), ("event", batch.event_EV),
    )  # fmt: skip
    for side, rows_MF in sides:
        yield from zip(model.schema.of_side(side), rows_MF.unbind(1), strict=True)


def _parameter(table: str, prefix: str = TABLE) -> str:
    return f"embeddings.{prefix}{table}"


def _finite(gradient: Tensor | None) -> bool:
    if gradient is None:
        return True
    values = gradient._values() if gradient.is_sparse else gradient
    return bool(values.isfinite().all())
