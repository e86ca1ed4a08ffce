"""Bytes off the wire: good ones parse, bad ones are pinned to the text that is bad."""

from __future__ import annotations

import random

from openbook.v1 import knowledge_base_pb2 as kb
from openbook.v1 import openbook_pb2 as pb
from openbook_server.wire import parser

parse_embed = parser(pb.EmbedRequest, max_message_bytes=10_000)
parse_answer = parser(pb.AnswerRequest, max_message_bytes=10_000)


def test_a_valid_message_is_parsed_as_protobuf_does() -> None:
    request = pb.AnswerRequest(questions=["who?", "où ?"], top_k=-3, omit_text=True)
    parsed = parse_answer(request.SerializeToString())
    assert (parsed.message, parsed.not_utf8, parsed.failure) == (request, frozenset(), None)


def test_a_text_that_is_not_utf8_is_emptied_and_named_while_the_others_survive() -> None:
    data = b"\x0a\x04good" + b"\x0a\x03b\xffd" + b"\x10\x01" + b"\x0a\x05later"
    parsed = parse_embed(data)
    assert list(parsed.message.texts) == ["good", "", "later"]
    assert parsed.message.truncate
    assert parsed.not_utf8 == {("texts", 1)}


def test_a_text_inside_a_nested_message_is_pinned_to_that_message() -> None:
    parse = parser(kb.UpsertRequest, max_message_bytes=10_000)
    good = kb.Document(id="a", text="x" * 300, metadata={"k": "v"})
    bad = b"\x0a\x01b" + b"\x1a\x02\xff\xfe"  # id, then a text that is not UTF-8
    worse = b"\x0a\x01c" + b"\x1a\x04text" + b"\x2a\x04\x0a\x02\xff\xfe"  # in a key of the metadata
    data = b"".join(b"\x0a" + len(part).to_bytes(1) + part for part in (bad, worse))
    parsed = parse(kb.UpsertRequest(documents=[good]).SerializeToString() + data)
    assert parsed.not_utf8 == {("documents", 1), ("documents", 2)}
    assert [(document.id, document.text) for document in parsed.message.documents] == [("a", good.text), ("b", ""), ("c", "text")]
    assert parsed.message.documents[0] == good


def test_what_is_no_item_of_a_list_is_never_emptied_for_that_changes_what_is_meant() -> None:
    excluded = pb.Filter(**{"not": pb.Filter(equals=pb.Filter.Equals(key="status", value="gone"))})
    data = pb.AnswerRequest(questions=["who?"], filter=excluded).SerializeToString().replace(b"gone", b"go\xe9e")
    failure = parse_answer(data).failure
    assert failure is not None
    assert failure.field == "filter"
    publish = parser(kb.PublishGenerationRequest, max_message_bytes=10_000)
    failure = publish(kb.PublishGenerationRequest(name="abcd").SerializeToString().replace(b"abcd", b"ab\xffd")).failure
    assert failure is not None
    assert failure.field == "name"


def group(field: int, inside: bytes) -> bytes:
    """An outdated way to nest: between two tags, without a length."""
    return bytes([field << 3 | 3]) + inside + bytes([field << 3 | 4])


def test_a_group_that_nobody_knows_does_not_make_a_bad_text_the_fault_of_all() -> None:
    unknown = group(15, group(14, b"\x0a\x02\xff\xfe") + b"\x08\x01" + group(1, b""))
    parsed = parse_embed(b"\x0a\x04good" + unknown + b"\x0a\x03b\xffd" + group(1, b"\x08\xff\x01") + b"\x0a\x05later" + b"\x0a\x01\xff")
    assert list(parsed.message.texts) == ["good", "", "later", ""]
    assert parsed.not_utf8 == {("texts", 1), ("texts", 3)}


def test_a_group_that_is_not_closed_or_too_deep_or_too_large_is_refused() -> None:
    deep = b""
    for _ in range(1_500):
        deep = group(15, deep)
    for bad in (deep, b"\x7b", b"\x7b\x74", b"\x7c", b"\x7b\x0a\x05x", group(15, b"\x08\x00" * 200_000)):
        assert parser(pb.EmbedRequest, max_message_bytes=1_000_000)(b"\x0a\x01\xff" + bad).failure is not None


def test_a_message_too_deep_or_of_too_many_fields_is_refused() -> None:
    nested = b""
    for _ in range(1_500):  # Filter.not, which protobuf follows a hundred deep
        size, length = len(nested), b""
        while size > 0x7F:
            length += bytes([size & 0x7F | 0x80])
            size >>= 7
        nested = bytes([pb.Filter.DESCRIPTOR.fields_by_name["not"].number << 3 | 2]) + length + bytes([size]) + nested
    assert str(parser(pb.Filter, max_message_bytes=10_000)(nested).failure).endswith("no openbook.v1.Filter message")
    many = b"\x0a\x00" * 200_000 + b"\x0a\x01\xff"
    assert parser(pb.EmbedRequest, max_message_bytes=1_000_000)(many).failure is not None


def test_bytes_that_are_no_message_name_the_message_expected() -> None:
    for data in (b"\x0a\x50short", b"\xff" * 20, b"\x0b\x0b", b"\x0a"):
        failure = parse_embed(data).failure
        assert failure is not None
        assert "openbook.v1.EmbedRequest" in str(failure)


def test_a_message_over_the_limit_is_told_both_numbers() -> None:
    failure = parse_embed(pb.EmbedRequest(texts=["x" * 20_000]).SerializeToString()).failure
    assert failure is not None
    assert "10000" in str(failure)
    assert "20004" in str(failure)


def test_random_bytes_never_raise() -> None:
    rng = random.Random(7)
    for _ in range(3000):
        parse_answer(rng.randbytes(rng.randrange(40)))


def test_every_damaged_valid_message_is_parsed_or_refused() -> None:
    rng = random.Random(8)
    data = pb.AnswerRequest(questions=["what is a list?", "wo liegt Köln?"], top_k=3, mode=pb.SEARCH_MODE_DENSE).SerializeToString()
    for _ in range(3000):
        damaged = bytearray(data)
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        parsed = parse_answer(bytes(damaged))
        assert parsed.failure is None or parsed.failure.field in {"request", "filter"}
