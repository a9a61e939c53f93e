"""The users whose keys and values are kept: least recently used out first, bounded in bytes.

One cache belongs to one loaded model; a new version starts with an empty one.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

from onetrans.serving.prefix import UserState


@dataclass
class CacheCounts:
    """What became of the requests that asked for a user, since the start."""

    equal: int = 0
    """The events were those kept: nothing was encoded."""
    appended: int = 0
    """Events were appended to those kept: these alone were encoded."""
    encoded: int = 0
    """Nothing of use was kept: all events were encoded."""
    evicted: int = 0
    """Users dropped for room."""


class UserCache:
    """States of users by user id; safe to use from several threads."""

    def __init__(self, max_bytes: int) -> None:
        """Keep at most ``max_bytes``; 0 keeps nothing."""
        self.max_bytes = max_bytes
        self.counts = CacheCounts()
        self.bytes = 0
        self._users: OrderedDict[str, UserState] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._users)

    def get(self, user: str | None) -> UserState | None:
        """Return what is kept of a user, who becomes the most recently used; None for a request without a user id."""
        with self._lock:
            if user is None or user not in self._users:
                return None
            self._users.move_to_end(user)
            return self._users[user]

    def put(self, user: str | None, state: UserState) -> None:
        """Keep a user's state and drop others until there is room; one that is larger than the cache is not kept."""
        size = state.nbytes + ENTRY_BYTES
        if user is None or size > self.max_bytes:
            return
        with self._lock:
            before = self._users.pop(user, None)
            if before is not None:
                self.bytes -= before.nbytes + ENTRY_BYTES
            while self.bytes + size > self.max_bytes:
                _, dropped = self._users.popitem(last=False)
                self.bytes -= dropped.nbytes + ENTRY_BYTES
                self.counts.evicted += 1
            self._users[user] = state
            self.bytes += size


ENTRY_BYTES = 6_000
"""What an entry needs beside the numbers: its objects, the heads of some 12 tensors, and the allocator's rounding."""
