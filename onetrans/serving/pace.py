"""How long what waits will take, judged by how fast recent work went."""

from __future__ import annotations

import math


class Pace:
    """Work that is ahead, in some unit, and the time a unit takes."""

    def __init__(self, remembered: float, seconds: float) -> None:
        """Judge by the last ``remembered`` units or so; until then a unit takes ``seconds``.

        So much is remembered that one small piece of work which was held up does not count for much.
        """
        self.ahead = 0.0
        self._remembered = remembered
        self._recent, self._recent_s = remembered, remembered * seconds

    def expected_s(self, work: float) -> float:
        """Return the time that some work takes."""
        return work * self._recent_s / self._recent

    def took(self, work: float, seconds: float) -> None:
        """Take note of how long some work took."""
        still = math.exp(-work / self._remembered)
        self._recent = self._recent * still + work
        self._recent_s = self._recent_s * still + seconds
