"""The inference engine: raw values of users, items and context in, CTR, CVR and CTCVR out.

Values go through the model's own feature schema, by the same code as the rows it was trained on
(:mod:`onetrans.requests`).  The past events of a request are encoded once for all its candidates, and kept for the
user's next request where that is exact (:mod:`onetrans.serving.prefix`).

Shape suffixes: those of :mod:`onetrans.batch`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from onetrans.artifact import load_model
from onetrans.batch import RequestBatch
from onetrans.errors import BadDataError
from onetrans.models import OneTrans, RankingModel
from onetrans.models.compute import Compute, choose_device
from onetrans.models.ranking import Scores
from onetrans.requests import RequestEncoder
from onetrans.serving.cache import UserCache
from onetrans.serving.packed import PackedOneTrans, packable
from onetrans.serving.prefix import UserState, appendable, event_table, extend, join, reusable, split
from onetrans.serving.source import ModelSource, opened
from onetrans.settings import ServingSettings, Settings, load_settings
from onetrans.tracking import SCORE_TOLERANCE

DEFAULT_MODEL = "models:/onetrans-ranker@champion"


class Probabilities(NamedTuple):
    """Scores of the candidates of some requests, in their order; float64."""

    ctr_N: npt.NDArray[np.float64]
    """P(click | impression)."""
    cvr_N: npt.NDArray[np.float64]
    """P(conversion | click)."""


class OneTransInferenceEngine:
    """A loaded model that answers ranking requests; safe to call from several threads.

    >>> engine = OneTransInferenceEngine("models:/onetrans-ranker@champion")
    >>> engine.rank(request)[0]
    {'item_id': 'sku-7', 'index': 3, 'ctr': 0.21, 'cvr': 0.4, 'ctcvr': 0.084}
    """

    def __init__(self, model: str = DEFAULT_MODEL, settings: Settings | None = None) -> None:
        """Load a model.

        Args:
            model: ``models:/NAME@ALIAS``, ``models:/NAME/VERSION``, ``models:/MODEL_ID``, ``runs:/RUN_ID``, or the
                folder of a saved model, local or in an object store.
            settings: where MLflow is, and ``[serving]``; by default those of this process.

        Raises:
            NotReadyError: if the alias names no version yet.
            BadConfigError: if the address is not understood, or a setting does not fit.
            BadDataError: if the model is damaged or does not score as it did when it was logged.
        """
        settings = settings or load_settings()
        with opened(model, settings.mlflow) as source:
            self._load(source, settings.serving)

    @classmethod
    def from_source(cls, source: ModelSource, serving: ServingSettings) -> OneTransInferenceEngine:
        """Load a model whose address was opened before; raises as the constructor does."""
        engine = cls.__new__(cls)
        engine._load(source, serving)
        return engine

    def _load(self, source: ModelSource, serving: ServingSettings) -> None:
        self.source = source
        self.serving = serving
        self.device = choose_device("serving.device", serving.device)
        self.model: RankingModel
        self.model, self.schema, self.config = load_model(source.folder)
        self.encode = RequestEncoder(self.schema, self.config.max_seq_len)
        self.model.to(self.device).use(Compute(serving.precision))
        model = self.model
        self.packed: PackedOneTrans | None = None
        if isinstance(model, OneTrans) and packable(model):
            self.packed = PackedOneTrans(model, serving.precision)
        self.cache = UserCache(serving.cache_mib << 20)
        self.difference = self._check()

    def _check(self) -> float | None:
        """Score the fixed batch that was kept with the model; return the largest difference, None without a batch."""
        kept = self.source.kept
        if kept is None:
            return None
        requests, scores = kept
        found = self.score(self.encode(requests), [None] * len(requests))
        difference = max(
            float(np.abs(found.ctr_N - np.array([row["ctr"] for row in scores])).max()),
            float(np.abs(found.cvr_N - np.array([row["cvr"] for row in scores])).max()),
        )
        allowed = SCORE_TOLERANCE if self.serving.precision == "float32" else BFLOAT16_TOLERANCE
        if not difference <= allowed:
            raise BadDataError(
                f"{self.source.address} (version {self.source.version}) does not score as it did when it was logged: "
                f"a probability of the {len(requests)} requests kept with it differs by {difference:.2g}, at most "
                f"{allowed:g} is allowed"
            )
        return difference

    def warm(self) -> float:
        """Answer one request of every size that was kept with the model; return the seconds it took."""
        began = time.perf_counter()
        kept = self.source.kept
        if kept is not None:
            for _ in range(2):
                self.score(self.encode(kept[0]), [None] * len(kept[0]))
        return time.perf_counter() - began

    # Answers

    def single_inference(
        self,
        user_features: Mapping[str, Any],
        item_features: Mapping[str, Any],
        context_features: Mapping[str, Any],
        sequence_features: Mapping[str, Sequence[Mapping[str, Any]]],
        *,
        ts: int | str | None = None,
        user_id: str | None = None,
    ) -> dict[str, float]:
        """Return ``ctr``, ``cvr`` and ``ctcvr`` of one item.

        Args:
            user_features: value of each user feature, by feature name; None where it is not known.
            item_features: likewise of the item.
            context_features: likewise of the request.
            sequence_features: per behaviour sequence its events, each with ``ts`` and the event features.
            ts: time of the request, microseconds since 1970 or ISO 8601 with an offset; by default now.
            user_id: if given, the user's side is kept for the next request.

        Raises:
            BadDataError: naming the feature that does not fit.
        """
        request = {
            "ts": time.time_ns() // 1000 if ts is None else ts,
            "user_id": user_id,
            "user": user_features,
            "context": context_features,
            "sequences": sequence_features,
        }
        item = {"item_id": "", **item_features}
        return {task: value for task, value in self.rank(request, [item])[0].items() if task in ("ctr", "cvr", "ctcvr")}

    def rank(
        self, request: Mapping[str, Any], candidates: Sequence[Mapping[str, Any]] | None = None
    ) -> list[dict[str, Any]]:
        """Return the candidates of a request, best first by CTCVR: ``item_id, index, ctr, cvr, ctcvr``.

        Args:
            request: as :mod:`onetrans.requests` describes it, with ``user_id`` if the user's side is to be kept.
            candidates: the candidates, if the request does not hold them.

        Raises:
            BadDataError: naming the feature that does not fit.
        """
        asked = dict(request) if candidates is None else {**request, "candidates": candidates}
        return self.rank_many([asked])[0]

    def rank_many(self, requests: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
        """Answer several requests at once; as :meth:`rank`."""
        if not requests:
            return []
        scores = self.score(self.encode(requests), [user_of(request) for request in requests])
        answers, start = [], 0
        for request in requests:
            count = len(request["candidates"])
            part = slice(start, start + count)
            items = [candidate["item_id"] for candidate in request["candidates"]]
            answers.append(ranked(items, scores.ctr_N[part], scores.cvr_N[part]))
            start += count
        return answers

    def known(self, user: str | None, digest: bytes, ts: Any) -> UserState | None:
        """Return what is kept of a user if it was computed from the text with this digest, and lies before ``ts``."""
        if user is None or not isinstance(self.model, OneTrans) or type(ts) is not int:
            return None
        kept = self.cache.get(user)  # nothing is ever put there if it cannot be used again
        return kept if kept is not None and kept.digest == digest and kept.latest_us < ts else None

    @torch.inference_mode()
    def score(
        self,
        batch: RequestBatch,
        users: Sequence[str | None],
        known: Sequence[UserState | None] = (),
        digests: Sequence[bytes | None] = (),
    ) -> Probabilities:
        """Score the candidates of requests that ``encode`` made a batch of.

        Args:
            batch: the requests, on the CPU.
            users: user id of each request; None if nothing is to be kept.
            known: what :meth:`known` gave for each; the events of such a request are not read, and may be left out.
            digests: digest of the text of each request's events, if there is one.

        Raises:
            BadDataError: if a score is not finite.
        """
        batch = batch if self.device.type == "cpu" else batch.to(self.device)
        asked = _Asked(users, known or [None] * len(users), digests or [None] * len(users))
        logits = self._logits(batch, asked)
        ctr_N = torch.sigmoid(logits.ctr_logit_N.double()).cpu().numpy()
        cvr_N = torch.sigmoid(logits.cvr_logit_N.double()).cpu().numpy()
        if not (np.isfinite(ctr_N).all() and np.isfinite(cvr_N).all()):
            raise BadDataError(f"{self.source.address} (version {self.source.version}) gave a score that is not finite")
        return Probabilities(ctr_N, cvr_N)

    def _logits(self, batch: RequestBatch, asked: _Asked) -> Scores:
        model = self.model
        with contextlib.nullcontext() if self.packed is not None else model.autocast():
            if not isinstance(model, OneTrans):
                return model(batch)
            keeps = reusable(model.config) and self.cache.max_bytes > 0 and any(u is not None for u in asked.users)
            if self.packed is None and not keeps:
                return model(batch)
            events_EW = event_table(batch)
            states = self._states(model, batch, events_EW, asked) if keeps else self._encode(model, batch, events_EW)
            if self.packed is not None:
                return self.packed.score(batch, states)
            return model.score_candidates(batch, join(states))

    def _encode(self, model: OneTrans, batch: RequestBatch, events_EW: Tensor) -> list[UserState]:
        """Run stage I."""
        if self.packed is not None:
            return self.packed.encode(batch, events_EW)
        return split(model.encode_requests(batch), events_EW, batch.event_offsets_O)

    def _states(self, model: OneTrans, batch: RequestBatch, events_EW: Tensor, asked: _Asked) -> list[UserState]:
        """Run stage I for what is not kept, keep it, and return the state of each request."""
        offsets = batch.event_offsets_O.tolist()
        states: list[UserState | None] = list(asked.known)
        appended: list[int] = []
        encoded: list[int] = []
        found: list[UserState] = []
        for request, user in enumerate(asked.users):
            if states[request] is not None:
                continue
            own_EW = events_EW[offsets[request] : offsets[request + 1]]
            kept = self.cache.get(user)
            if kept is None:
                encoded.append(request)
            elif torch.equal(kept.events_EW, own_EW):
                states[request] = noted = replace(kept, digest=asked.digests[request])
                self.cache.put(user, noted)
            elif appendable(model.config, kept.events_EW, own_EW):
                appended.append(request)
                found.append(kept)
            else:
                encoded.append(request)
        counts = self.cache.counts
        counts.equal += len(states) - len(appended) - len(encoded)
        counts.appended += len(appended)
        counts.encoded += len(encoded)
        if appended:
            part = batch.select(torch.tensor(appended, device=batch.event_offsets_O.device))
            self._keep(appended, extend(model, found, part, event_table(part)), asked, states)
        if encoded:
            part, of_part_EW = batch, events_EW
            if len(encoded) < len(states):
                part = batch.select(torch.tensor(encoded, device=batch.event_offsets_O.device))
                of_part_EW = event_table(part)
            self._keep(encoded, self._encode(model, part, of_part_EW), asked, states)
        return [state for state in states if state is not None]

    def _keep(
        self, requests: Sequence[int], new: Sequence[UserState], asked: _Asked, states: list[UserState | None]
    ) -> None:
        for request, state in zip(requests, new, strict=True):
            states[request] = state
            if asked.users[request] is not None:
                self.cache.put(asked.users[request], state.kept(asked.digests[request]))


class _Asked(NamedTuple):
    """What is known of the users of a batch, request by request."""

    users: Sequence[str | None]
    known: Sequence[UserState | None]
    digests: Sequence[bytes | None]


def ranked(
    items: Sequence[str], ctr_N: npt.NDArray[np.float64], cvr_N: npt.NDArray[np.float64]
) -> list[dict[str, Any]]:
    """Return one answer's candidates, best first by CTCVR; equal ones in the order given."""
    ctcvr_N = ctr_N * cvr_N
    ctr, cvr, ctcvr = ctr_N.tolist(), cvr_N.tolist(), ctcvr_N.tolist()
    return [
        {"item_id": items[n], "index": n, "ctr": ctr[n], "cvr": cvr[n], "ctcvr": ctcvr[n]}
        for n in np.argsort(-ctcvr_N, kind="stable").tolist()
    ]


def user_of(request: Mapping[str, Any]) -> str | None:
    """Return the user id under which a request's user side is kept.

    Raises:
        BadDataError: if it is neither text nor null.
    """
    user = request.get("user_id")
    if user is None or isinstance(user, str):
        return user
    raise BadDataError(f"request {request.get('request_id')}: user_id is {user!r}, needed is text or null")


BFLOAT16_TOLERANCE = 2e-2
"""Largest difference of a probability in bfloat16: 8 bits of mantissa through all blocks."""
