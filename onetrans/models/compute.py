"""How a model is computed, never what: precision and recomputation.

Read without torch, so that settings can be checked early.  None of it changes
the weights a model has, and all of it computes the same function to within the
rounding of the precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from onetrans.errors import BadConfigError

if TYPE_CHECKING:
    import torch

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Compute:
    """How the forward and backward pass of a model run."""

    precision: Precision = "float32"
    """What matrix products are computed in; weights, norms and losses stay in float32 (autocast)."""
    recompute: bool = False
    """Whether a block keeps only its inputs for the backward pass and computes the rest again (OneTrans alone)."""


def choose_device(setting: str, name: str) -> torch.device:
    """Return the device that a setting names; ``auto`` is the GPU where there is one.

    Args:
        setting: its name, to be told.
        name: its value, which the settings have checked.

    Raises:
        BadConfigError: if there is no such GPU.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        build = torch.version.cuda or "none: a CPU build"
        seen = f"PyTorch {torch.__version__} (CUDA {build}) sees {torch.cuda.device_count()} GPUs"
        raise BadConfigError(f"{setting} = {name!r}, but {seen}")
    return device
