"""How a model is computed, never what: precision and recomputation.

Read without torch, so that settings can be checked early.  None of it changes
the weights a model has, and all of it computes the same function to within the
rounding of the precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Compute:
    """How the forward and backward pass of a model run."""

    precision: Precision = "float32"
    """What matrix products are computed in; weights, norms and losses stay in float32 (autocast)."""
    recompute: bool = False
    """Whether a block keeps only its inputs for the backward pass and computes the rest again (OneTrans alone)."""
