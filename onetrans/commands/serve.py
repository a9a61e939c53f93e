"""``onetrans serve``: answer ranking requests over HTTP with a registered model, and follow its alias."""

from __future__ import annotations

import argparse
import gc
import ipaddress
import logging
import os
import socket
from dataclasses import replace

from onetrans.cores import usable_cores
from onetrans.errors import BadConfigError
from onetrans.progress import long_steps
from onetrans.settings import Settings, load_settings

TOKEN_VARIABLE = "ONETRANS_SERVING_TOKEN"
"""Holds the bearer token that clients have to send; without it none is asked for."""

EXAMPLES = """examples:
  onetrans serve
  onetrans serve --model models:/onetrans-ranker@champion --port 8765
  ONETRANS_SERVING_TOKEN=... onetrans serve --host 0.0.0.0"""

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "--model",
        help="models:/NAME@ALIAS, models:/NAME/VERSION, runs:/RUN_ID or a folder (default: the champion)",
    )
    parser.add_argument("--host", help="interface to listen on (default: serving.host, this machine alone)")
    parser.add_argument("--port", type=int, help="port; 0 takes a free one (default: serving.port)")


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C, by which the process ends once what was accepted is answered."""
    settings = chosen(load_settings(), arguments)
    serve(arguments.model or f"models:/{settings.mlflow.registered_model}@champion", settings)
    return 0


def chosen(settings: Settings, arguments: argparse.Namespace) -> Settings:
    """Return the settings with what the command line says."""
    given = {name: getattr(arguments, name) for name in ("host", "port") if getattr(arguments, name) is not None}
    return replace(settings, serving=replace(settings.serving, **given))


def serve(address: str, settings: Settings) -> None:
    """Load a model and answer requests until told to end.

    Raises:
        NotReadyError: if the alias names no version yet, or MLflow does not answer.
        BadConfigError: if the address is not understood, or the port is taken.
        BadDataError: if the model is refused.
    """
    import torch
    import uvicorn

    from onetrans.serving.app import RankingService
    from onetrans.serving.watch import ServedModel
    from onetrans.serving.web import server_config
    from onetrans.tracking import require_answer, store_is_there

    serving, token = settings.serving, os.environ.get(TOKEN_VARIABLE, "")
    torch.set_num_threads(serving.threads or usable_cores())
    listener = _listener(serving.host, serving.port)
    try:
        with long_steps(None, f"loading {address}"):
            if address.startswith(("models:/", "runs:/")) and store_is_there(settings.mlflow):
                require_answer(settings.mlflow)
            model = ServedModel(address, settings)
        service = RankingService(model, token)
        # A collection of garbage passes over all that lives, and would hold up every request for a tenth of a second
        # or more; what is there now lives as long as the process.
        gc.collect()
        gc.freeze()
        if not token and not _is_loopback(serving.host):
            logger.warning(
                "listening on %s without a token: whoever reaches the port may ask; set %s",
                serving.host,
                TOKEN_VARIABLE,
            )
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if listener.family == socket.AF_INET6 else host

        class Server(uvicorn.Server):
            """Says where it listens once it does."""

            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                if self.started:
                    print(f"http://{shown}:{port}", flush=True)

        Server(server_config(service, timeout_graceful_shutdown=15)).run(sockets=[listener])
    finally:
        listener.close()


def _listener(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise BadConfigError(f"serving.host = {host!r}, serving.port = {port}: cannot listen there: {error}") from error
    return listener


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
