"""The served model, and its exchange while requests are answered.

A model named by an alias follows it: a thread looks every ``serving.poll_s`` seconds which version the alias names.  A
new one is loaded beside the old one, has to give the fixed batch the scores that were logged at training, answers that
batch a few times so that nothing is slow the first time, and then takes over.  A request is scored whole by the model
it was encoded for, so none fails.

A version that cannot be loaded, or scores otherwise, is refused: the old one stays, the log and the metrics say so, and
it is not tried again until the alias names another.  If MLflow cannot be reached, the next look tries again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime

from onetrans.errors import BadConfigError, BadDataError
from onetrans.serving.engine import OneTransInferenceEngine
from onetrans.serving.source import current_version, opened
from onetrans.settings import Settings

logger = logging.getLogger(__name__)


class ServedModel:
    """The engine that answers now."""

    def __init__(self, address: str, settings: Settings) -> None:
        """Load and warm the model that ``address`` names now.

        Raises:
            NotReadyError: if the alias names no version yet.
            BadConfigError: if the address is not understood.
            BadDataError: if the version is refused.
        """
        self.address = address
        self.settings = settings
        self.swaps = 0
        self.refusals = 0
        self.failed_looks = 0
        self.refused: str | None = None
        self.on_swap: Callable[[], None] = lambda: None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.engine = self._load()
        self.since = _now()

    def _load(self) -> OneTransInferenceEngine:
        began = time.monotonic()
        with opened(self.address, self.settings.mlflow) as source:
            engine = OneTransInferenceEngine.from_source(source, self.settings.serving)
        warm_s = engine.warm()
        checked = (
            "no fixed batch is kept with it"
            if engine.difference is None
            else f"its fixed batch differs by {engine.difference:.2g}"
        )
        logger.info(
            "%s: version %s loaded in %.1f s, warm in %.1f s; %s",
            self.address, engine.source.version, time.monotonic() - began - warm_s, warm_s, checked,
        )  # fmt: skip
        return engine

    def look(self) -> bool:
        """Look at the alias once and swap if it moved; tell whether it was swapped.  Never raises."""
        try:
            wanted = current_version(self.address, self.settings.mlflow)
        except Exception as error:
            self.failed_looks += 1
            logger.warning("%s: the registry did not answer, looking again later: %s", self.address, error)
            return False
        if wanted == self.engine.source.version:
            self.refused = None  # The alias has left the refused version; when it returns there, that is tried again.
        if wanted is None or wanted in (self.engine.source.version, self.refused) or "@" not in self.address:
            return False
        try:
            engine = self._load()
        except (BadDataError, BadConfigError) as error:
            self.refused = wanted
            self.refusals += 1
            logger.error(
                "%s: version %s is refused, version %s stays: %s",
                self.address, wanted, self.engine.source.version, error,
            )  # fmt: skip
            return False
        except Exception as error:
            self.failed_looks += 1
            logger.exception("%s: version %s could not be loaded, trying again later: %s", self.address, wanted, error)
            return False
        before, self.engine, self.since, self.refused = self.engine, engine, _now(), None
        self.swaps += 1
        self.on_swap()
        logger.info("%s: version %s takes over from version %s", self.address, wanted, before.source.version)
        return True

    def start(self) -> None:
        """Begin to follow the alias."""
        self._thread = threading.Thread(target=self._follow, name="follow-alias", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop following."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _follow(self) -> None:
        while not self._stop.wait(self.settings.serving.poll_s):
            self.look()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
