"""Addresses, and what becomes of answers that no healthy server gives; those come from a server that says what it is told."""

from __future__ import annotations

import base64
import json
import logging
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from openbook import cli
from openbook_server.errors import InvalidRequest, KnowledgeBaseRefused, KnowledgeBaseUnavailable, OpenBookError
from openbook_server.knowledge.elastic import connection
from openbook_server.knowledge.elastic.address import API_KEY, parse_address
from openbook_server.knowledge.elastic.connection import Connection
from openbook_server.knowledge.elastic.knowledge_base import ElasticsearchKnowledgeBase
from openbook_server.knowledge.elastic.schema import ADDED, sortable
from openbook_server.knowledge.opening import describe_address, open_knowledge_base

Answer = tuple[int, Any]
INFO: Answer = (200, {"version": {"number": "9.5.3"}, "tagline": "You Know, for Search"})


class Scripted:
    """Answers requests with what it was told, in that order, and keeps what it was asked."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.requests: list[tuple[str, dict[str, str], str]] = []  # path, headers, body
        self.answering = threading.Event()  # else it hangs
        self.answering.set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0))).decode()
                outer.requests.append((self.path, dict(self.headers), body))
                outer.answering.wait()
                status, answer = outer.answers.pop(0)
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("content-type", "application/vnd.elasticsearch+json;compatible-with=9")
                self.send_header("x-elastic-product", "Elasticsearch")
                self.send_header("content-length", str(len(data)))
                with suppress(OSError):  # who asked may be gone
                    self.end_headers()
                    self.wfile.write(data)

            do_POST = do_PUT = do_GET  # noqa: N815

            def log_message(self, *arguments: object) -> None:
                """Quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.host = f"127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    scripted = Scripted()
    thread = threading.Thread(target=scripted.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield scripted
    scripted.answering.set()
    scripted.server.shutdown()
    thread.join()
    scripted.server.server_close()


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_FIRST_WAIT", 0.001)
    monkeypatch.setattr(connection, "PATIENCE", 0.2)
    monkeypatch.setattr(connection, "WRITING_PATIENCE", 0.2)


def failed(status: int, kind: str, reason: str = "") -> Answer:
    cause = {"type": kind, "reason": reason, "index": "kb-1"}
    return status, {"error": {"root_cause": [cause], **cause}, "status": status}


def asked(scripted: Scripted, target: str = "") -> Connection:
    return Connection(parse_address(target or f"elasticsearch://{scripted.host}/kb"))


def test_an_address_says_all_that_there_is_to_say() -> None:
    address = parse_address("elasticsearchs://joe:p%40ss%3A%2F@a,b:9201,[::1]:9202/kb.v1?shards=3&replicas=2&active_copies=2&timeout=7")
    assert address.hosts == (("a", 9200), ("b", 9201), ("::1", 9202))
    assert (address.user, address.password, address.tls, address.alias) == ("joe", "p@ss:/", True, "kb.v1")
    assert (address.shards, address.replicas, address.active_copies, address.timeout) == (3, 2, 2, 7.0)
    assert address.name == "elasticsearchs://a:9200,b:9201,[::1]:9202/kb.v1"
    assert "p@ss" not in repr(address)


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("elasticsearch://h", "no name of an alias"),
        ("elasticsearch://h/UPPER", "no name of an alias"),
        ("elasticsearch://h/a/b", "no name of an alias"),
        ("elasticsearch:///a", "host is missing"),
        ("elasticsearch://h:x/a", "port is no number"),
        ("elasticsearch://h/a?shard=1", "unknown option 'shard'"),
        ("elasticsearch://h/a?shards=0", "shards=0 is no number from 1 to 1024"),
        ("elasticsearch://h/a?replicas=0&active_copies=2", "active_copies=2"),
        ("elasticsearch://h/a?ca=/no/such", "ca=/no/such is no file"),
        (f"elasticsearch://h/a?ca={__file__}", "is for elasticsearchs://"),
        ("opensearch://h/a", "opensearch:// is no scheme"),
        ("elasticsearch:/h/a", "after elasticsearch: two slashes are missing"),
        ("elasticsearch://h/a-previous", "'a-previous' is a name that generations of another knowledge base get"),
        ("elasticsearch://h/a-kept", "'a-kept' is a name that"),
        ("elasticsearch://h/a-1-0123456789ab", "'a-1-0123456789ab' is a name that"),
        ("elasticsearch://h/a-1-0123456789ab-here", "'a-1-0123456789ab-here' is a name that"),
    ],
)
def test_an_address_that_is_none_is_refused_with_what_is_wrong_and_its_form(target: str, problem: str) -> None:
    with pytest.raises(InvalidRequest, match=r"elasticsearch\[s\]://") as raised:
        parse_address(target)
    assert problem in str(raised.value)


PASSWORD_IN_A_WRONG_PLACE = [
    "elasticsearch://u:se/cret@h/a",
    "elasticsearch://u:se?cret@h/a",
    "elasticsearch://u:se#cret@h/UP",
    "elasticsearch:/u:secret@h/a",
    "elasticsearchs:u:secret@h/a",
    "Elasticsearch:/u:secret@http://h/a",
]


@pytest.mark.parametrize("target", PASSWORD_IN_A_WRONG_PLACE)
def test_a_password_is_not_quoted_even_where_it_makes_the_address_wrong(target: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        parse_address(target)
    assert "cret" not in str(raised.value)


@pytest.mark.parametrize("slashes", ["/", "", "//"])
@pytest.mark.parametrize("command", [["info"], ["generations", "list"], ["generations", "remove"]])
def test_an_address_that_is_mistyped_is_no_folder_and_no_server(
    slashes: str, command: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    target = f"elasticsearch:{slashes}u:secret@h:9200/UPPER"
    assert cli.main([*command, target, *(["1-0a1b2c3d4e5f"] if command[-1] == "remove" else [])]) == 1
    printed = capsys.readouterr()
    assert "an address is elasticsearch" in printed.err
    assert "secret" not in printed.out + printed.err
    bundle: Any = SimpleNamespace(embedder=SimpleNamespace(fingerprint="f", dim=8), id="b", folder=tmp_path)
    with pytest.raises(InvalidRequest):
        open_knowledge_base(target, bundle, create=True)
    assert list(tmp_path.iterdir()) == []


def test_what_may_heal_is_tried_again_and_then_named(scripted: Scripted) -> None:
    scripted.answers = [failed(503, "master_not_discovered_exception"), failed(429, "es_rejected_execution_exception"), INFO]
    asked(scripted).check_version()
    assert len(scripted.requests) == 3
    scripted.answers = [failed(503, "master_not_discovered_exception", "no master")] * 1_000
    with pytest.raises(KnowledgeBaseUnavailable, match="master_not_discovered"):
        asked(scripted).check_version()


def test_only_the_entries_that_failed_are_sent_again_and_conflicts_are_told_apart(scripted: Scripted) -> None:
    busy = {"status": 429, "error": {"type": "es_rejected_execution_exception", "reason": "full"}}
    conflict = {"status": 409, "error": {"type": "version_conflict_engine_exception", "reason": "other"}}
    scripted.answers = [
        (200, {"errors": True, "items": [{"index": {"status": 201}}, {"index": busy}, {"index": conflict}]}),
        (200, {"errors": False, "items": [{"index": {"status": 201, "_seq_no": 7}}]}),
    ]
    results = asked(scripted).bulk("kb", [({"index": {"_id": id_}}, {"text": id_}) for id_ in "abc"], will_open=lambda: False)
    assert results == [{"status": 201}, {"status": 201, "_seq_no": 7}, None]
    first, second = (body.splitlines() for _, _, body in scripted.requests)
    assert (len(first), second) == (6, first[2:4])


def test_an_answer_from_some_of_the_shards_is_none(scripted: Scripted) -> None:
    part = (200, {"_shards": {"total": 3, "successful": 2, "failed": 1}, "hits": {"hits": []}})
    whole = (200, {"_shards": {"total": 3, "successful": 3, "failed": 0}, "hits": {"hits": []}})
    scripted.answers = [part, (200, {"responses": [whole[1], part[1]]}), whole]
    assert asked(scripted).call(lambda client: client.search(index="kb")) == whole[1]
    scripted.answers = [part] * 1_000
    with pytest.raises(KnowledgeBaseUnavailable, match="1 of 3 shards"):
        asked(scripted).call(lambda client: client.search(index="kb"))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (failed(401, "security_exception", "unable to authenticate user [joe]"), API_KEY),
        (failed(403, "security_exception"), API_KEY),
        (failed(400, "media_type_header_exception"), "older than Elasticsearch 9"),
        ((200, {"version": {"number": "8.19.0"}}), "is Elasticsearch 8.19.0"),
        (failed(403, "cluster_block_exception", "index [kb] blocked by: [FORBIDDEN/8/index write (api)];"), "read-only"),
        (failed(403, "cluster_block_exception", "index [kb] blocked by: [FORBIDDEN/7/index read (api)];"), "index.blocks.read"),
        (failed(403, "cluster_block_exception", "index [kb] blocked by: [FORBIDDEN/9/index metadata (api)];"), "index.blocks.metadata"),
        (failed(400, "index_closed_exception", "closed"), "POST kb-1/_open"),
        (
            failed(400, "validation_exception", "this action would add [2] shards, but this cluster currently has [11]/[9] maximum normal"),
            "has 11 shards and copies, and its setting cluster.max_shards_per_node allows 9",
        ),
    ],
)
def test_what_an_operator_must_mend_is_named_at_once(scripted: Scripted, answer: Answer, message: str) -> None:
    scripted.answers = [answer]
    with pytest.raises(KnowledgeBaseRefused) as raised:
        asked(scripted).check_version()
    assert message in str(raised.value)
    assert scripted.host in str(raised.value)


def test_nothing_of_an_entry_stands_in_an_error_or_a_traceback(scripted: Scripted) -> None:
    reason = 'primary shard is not active, request: [BulkShardRequest [[kb][0]] containing [index {[kb][x], source[{"text":"s3cret"}]}]]'
    refused = {"status": 503, "error": {"type": "unavailable_shards_exception", "reason": reason}}
    requests: list[tuple[Answer, Callable[[], object]]] = [
        (failed(503, "unavailable_shards_exception", reason), lambda: asked(scripted).check_version()),
        ((200, {"responses": [refused]}), lambda: asked(scripted).call(lambda client: client.msearch(searches=[{}, {}]))),
        (
            (200, {"errors": True, "items": [{"index": refused}]}),
            lambda: asked(scripted).bulk("kb", [({"index": {"_id": "a"}}, {})], will_open=lambda: False),
        ),
    ]
    for answer, request in requests:
        scripted.answers = [answer] * 1_000
        with pytest.raises(KnowledgeBaseUnavailable, match="unavailable_shards_exception") as raised:
            request()
        assert "s3cret" not in "".join(traceback.format_exception(raised.value))


def test_a_server_that_is_not_there_is_named_and_the_next_host_is_asked(scripted: Scripted) -> None:
    with pytest.raises(KnowledgeBaseUnavailable, match=r"elasticsearch://127\.0\.0\.1:1/kb cannot be reached"):
        asked(scripted, "elasticsearch://127.0.0.1:1/kb").check_version()
    scripted.answers = [INFO] * 3
    asked(scripted, f"elasticsearch://127.0.0.1:1,{scripted.host}/kb").check_version()


def test_a_server_that_hangs_holds_up_no_question_and_no_write_where_there_is_another(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as hanging:  # takes connections, and never answers
        hanging.bind(("127.0.0.1", 0))
        hanging.listen()
        hosts = f"127.0.0.1:{hanging.getsockname()[1]},{scripted.host}"
        scripted.answers = [INFO] * 4
        connected = asked(scripted, f"elasticsearch://{hosts}/kb")  # with 30 seconds for one request
        for _ in range(4):  # the hosts take turns
            connected.check_version()
        monkeypatch.setattr(connection, "WRITING_PATIENCE", 20.0)
        scripted.answers = [(200, {"errors": False, "items": [{"index": {"status": 201}}]})] * 2
        connected = asked(scripted, f"elasticsearch://{hosts}/kb?timeout=1")
        for _ in range(2):
            assert connected.bulk("kb", [({"index": {"_id": "a"}}, {})], will_open=lambda: False) == [{"status": 201}]
    assert len(scripted.requests) == 6


def test_neither_a_look_at_what_is_live_nor_the_end_of_a_server_waits_for_a_cluster_that_hangs(scripted: Scripted) -> None:
    mappings = {"_meta": {"openbook": {"format": "1", "fingerprint": "f", "generation": "1-0123456789ab"}}, "properties": {**ADDED}}
    layout = {"number_of_shards": "1", "number_of_replicas": "0"}
    index = (200, {"kb-1-0123456789ab": {"aliases": {"kb": {}}, "mappings": mappings, "settings": {"index": layout}}})
    scripted.answers = [INFO, index, (200, {"status": "green"})]
    knowledge_base = ElasticsearchKnowledgeBase(f"elasticsearch://{scripted.host}/kb?timeout=600", fingerprint="f", dim=8)
    scripted.answering.clear()
    scripted.answers = [index] * 1_000
    refused: list[KnowledgeBaseUnavailable] = []

    def end() -> None:
        for work in (lambda: knowledge_base.live_generation, knowledge_base.snapshot):
            try:
                work()
            except KnowledgeBaseUnavailable as error:
                refused.append(error)

    ending = threading.Thread(target=end, daemon=True)
    ending.start()
    ending.join(timeout=60)  # of the 600 that a request may take
    assert len(refused) == 2
    knowledge_base.close()


def test_user_or_key_go_to_the_server_and_nowhere_else(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    target = f"elasticsearch://joe:s3cret@{scripted.host}/kb"
    scripted.answers = [INFO, failed(401, "security_exception"), INFO]
    asked(scripted, target).check_version()
    with pytest.raises(OpenBookError) as raised:
        asked(scripted, target).check_version()
    monkeypatch.setenv(API_KEY, "a2V5OmtleQ==")
    asked(scripted).check_version()
    sent = [{name.lower(): value for name, value in headers.items()}["authorization"] for _, headers, _ in scripted.requests]
    basic = base64.b64encode(b"joe:s3cret").decode()
    assert sent == [f"Basic {basic}", f"Basic {basic}", "ApiKey a2V5OmtleQ=="]
    for secret in ("s3cret", basic, "a2V5OmtleQ"):
        assert secret not in caplog.text
        assert secret not in str(raised.value)


def test_without_the_client_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "elasticsearch", None)
    with pytest.raises(KnowledgeBaseRefused, match=r"pip install '\.\[elasticsearch\]'"):
        describe_address("elasticsearch://h/a")


def test_terms_of_numbers_are_ordered_as_the_numbers_are() -> None:
    numbers = [float("-inf"), -1e300, -2.5, -1.0, -1e-300, 0.0, 5e-324, 1.0, 1.5, 2.0, 1e300, float("inf")]
    assert sorted(numbers, key=lambda number: sortable("k", number)) == numbers
    assert sortable("k", -0.0) == sortable("k", 0.0)
    assert sortable("k", 1.0)[:-16] != sortable("j", 1.0)[:-16]
