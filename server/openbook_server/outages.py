"""That the knowledge base fails what is asked of it, told to the log once, and that it is over. Pure but for the log, told the time.

A request's failure is its caller's to hear; but a full disk or a machine that does not answer is an operator's to mend.
"""

from __future__ import annotations

import logging

from openbook_server.errors import KnowledgeBaseDamaged, KnowledgeBaseRefused, KnowledgeBaseUnavailable, OpenBookError

log = logging.getLogger(__name__)

# Seconds without a failure after which it is over: one of every two requests may fail, and the log must not say so each time.
_STEADY = 10.0


class Outages:
    """Of one server's methods."""

    def __init__(self) -> None:
        self._failing: dict[tuple[str, str], float] = {}  # when a method last failed for a reason

    def failed(self, method: str, error: OpenBookError, now: float) -> None:
        """A request failed."""
        if not isinstance(error, KnowledgeBaseDamaged | KnowledgeBaseUnavailable | KnowledgeBaseRefused):
            return
        if (method, error.reason) not in self._failing:
            log.warning("%s fails: %s", method, error)
        self._failing[method, error.reason] = now

    def worked(self, method: str, now: float) -> None:
        """A request was answered."""
        if not self._failing:
            return
        over = [key for key, failed in self._failing.items() if key[0] == method and now - failed > _STEADY]
        for key in over:
            del self._failing[key]
        if over:
            log.info("%s works again", method)
