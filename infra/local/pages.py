"""The pages of MLflow and of the Data Docs on loopback: MLflow's server, and the Data Docs as static files."""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from infra.local.processes import Server, free_port, stop, wait_until
from onetrans import storage
from onetrans.errors import BadConfigError
from onetrans.settings import Settings

_PREFERRED_MLFLOW = 5000
_PREFERRED_DOCS = 8088
_EMPTY_SITE = "<!doctype html><title>Data Docs</title><p>No day has been audited yet; reload this page after the first."


@dataclass(frozen=True)
class Page:
    """A page and the server behind it."""

    title: str
    """What a person calls it."""
    address: str
    """Where to open it."""
    server: Server | None
    """Process to start; None when it runs elsewhere."""

    def ready(self) -> bool:
        """Tell whether the address answers."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(self.address, timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False


def mlflow_page(settings: Settings, logs: Path) -> Page:
    """Return MLflow's page for the tracking store of the settings; a tracking server that runs already is named."""
    store = settings.mlflow.tracking_uri
    if store.startswith(("http://", "https://")):
        return Page("MLflow", store, None)
    if (file := storage.sqlite_file(store)) is None:
        raise BadConfigError(f"mlflow.tracking_uri = {store!r}: the local page needs a sqlite:/// store or a server")
    database = file.resolve()
    database.parent.mkdir(parents=True, exist_ok=True)
    port = free_port(_PREFERRED_MLFLOW)
    arguments = ["server", "--backend-store-uri", f"sqlite:///{database}", "--host", "127.0.0.1", "--port", str(port)]
    arguments += ["--workers", "1", "--default-artifact-root", storage.address(settings.mlflow.artifacts)]
    environment = {
        **os.environ,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # Jobs of features this project does not use; each is a process of its own.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    server = Server(
        "mlflow", [sys.executable, "-m", "mlflow", *arguments], environment, logs / "mlflow.log", database.parent
    )
    return Page("MLflow", f"http://127.0.0.1:{port}", server)


def docs_page(site: str, logs: Path, address: str = "") -> Page | None:
    """Return the page of the Data Docs in a local folder.

    Those in an object store are served by others: at ``address``, if somebody has named it.
    """
    if not storage.is_local(site):
        return Page("Data Docs", address, None) if address else None
    folder = storage.local_path(site)
    folder.mkdir(parents=True, exist_ok=True)
    index = folder / "index.html"
    if not index.exists():
        index.write_text(_EMPTY_SITE, encoding="utf-8")
    port = free_port(_PREFERRED_DOCS)
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(folder)]
    server = Server("data-docs", command, dict(os.environ), logs / "data-docs.log", folder)
    return Page("Data Docs", f"http://127.0.0.1:{port}", server)


def wait_for(page: Page, seconds: float = 90.0) -> None:
    """Wait until a page answers.

    Raises:
        ServerError: if its server ends, or does not answer in time.
    """
    wait_until(page.ready, [page.server] if page.server else [], page.title, seconds)


@contextmanager
def served(shown: Sequence[Page]) -> Iterator[list[Server]]:
    """Start the servers of pages, wait until each page answers, and stop the servers at the end.

    Raises:
        ServerError: if a server ends, or does not answer in time.
    """
    servers = [page.server for page in shown if page.server]
    try:
        for server in servers:
            server.start()
        for page in shown:
            wait_for(page)
        yield servers
    finally:
        stop(servers)
