"""What the log says of a knowledge base that fails."""

from __future__ import annotations

import pytest
from openbook_server.errors import InvalidRequest, KnowledgeBaseDamaged, KnowledgeBaseUnavailable
from openbook_server.outages import Outages


def test_an_outage_is_told_once_when_it_begins_and_once_when_it_is_over(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    outages = Outages()
    outages.worked("Upsert", 0.0)
    outages.failed("Upsert", InvalidRequest("text", "secret"), 0.0)
    assert caplog.messages == []
    for second in range(100):
        outages.failed("Upsert", KnowledgeBaseDamaged("kb: the disk is full"), float(second))
        outages.worked("Upsert", second + 0.5)  # one of two requests fails
        outages.worked("Search", second + 0.5)  # which needs no room
    assert caplog.messages == ["Upsert fails: kb: the disk is full"]
    outages.failed("Upsert", KnowledgeBaseUnavailable("kb: it is locked"), 100.0)
    assert caplog.messages[1:] == ["Upsert fails: kb: it is locked"]
    for second in (111.0, 112.0):
        outages.worked("Upsert", second)
    assert caplog.messages[2:] == ["Upsert works again"]
    outages.failed("Upsert", KnowledgeBaseDamaged("kb: the disk is full"), 113.0)
    assert caplog.messages[3:] == ["Upsert fails: kb: the disk is full"]
