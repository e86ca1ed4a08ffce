"""What a request takes along from its first stage to its last: until when it is wanted, what it was promised, where its time went."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(slots=True)
class Work:
    """One request while it is worked on."""

    deadline: float  # time.monotonic() seconds after which nobody wants the result
    batch_invariant: bool = False  # it asked that its rows give the same bytes whatever else the server does
    tokenise_ms: float = 0.0
    embed_ms: float = 0.0
    search_ms: float = 0.0
    read_ms: float = 0.0
    rank_ms: float = 0.0
    queue_ms: float = 0.0  # of embed, search and read, the part spent waiting for their turn
    _mark: float = field(default_factory=time.perf_counter)

    @property
    def begun(self) -> bool:
        """Whether a model has done something for it."""
        return self.embed_ms > 0 or self.read_ms > 0

    def lap(self) -> float:
        """Milliseconds since the last lap, or since the start."""
        now = time.perf_counter()
        passed, self._mark = 1000 * (now - self._mark), now
        return passed
