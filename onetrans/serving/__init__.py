"""Scoring with a promoted model: the engine for a Python process, and the HTTP service around it.

``engine``    raw values in, CTR, CVR and CTCVR out; the user's side is encoded once
``packed``    OneTrans packed for a CPU: the same scores in fewer passes
``prefix``    which keys and values of a user may be reused, and how events are appended
``cache``     the users that are kept, bounded in bytes
``source``    where a model comes from, and the check of its fixed batch
``batcher``   requests scored together, deadlines, and what is turned away
``watch``     follows the alias and swaps the model
``pace``      how long what waits will take
``app``       the HTTP interface
``web``       the web server, and its bounds on connections
``metrics``   figures in Prometheus' text format
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onetrans.serving.engine import OneTransInferenceEngine

__all__ = ["OneTransInferenceEngine"]


def __getattr__(name: str) -> Any:
    if name == "OneTransInferenceEngine":  # imports torch, which no command that merely reads settings needs
        from onetrans.serving.engine import OneTransInferenceEngine

        return OneTransInferenceEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
