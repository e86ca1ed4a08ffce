"""Texts and pairs by the bundle's tokenizer: nothing cut silently, offsets in the passage's own characters."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from openbook_server import tokenization, validation
from openbook_server.config import ServerConfig
from openbook_server.errors import InvalidRequest
from openbook_server.rows import Row
from openbook_server.tokenization import TextEncoder, load_tokenizer
from openbook_server.validation import SPLIT, bounded, validate_texts


@pytest.fixture
def encoder(tiny_checkpoint: Path) -> TextEncoder:
    return TextEncoder(load_tokenizer(tiny_checkpoint / "tokenizer.json"))


def test_a_text_is_encoded_alone_as_it_is_among_others(encoder: TextEncoder) -> None:
    texts = ["red", "one two three city river king book", "blue green"]
    assert encoder.texts(texts) == [encoder.texts([text])[0] for text in texts]


def test_a_pair_has_the_question_first_and_offsets_of_the_passage(encoder: TextEncoder) -> None:
    passage = "the red city, the blue river"
    [pair] = encoder.pairs("what red ?", [passage], 64)
    assert pair.row.types is not None
    first = pair.row.types.index(1)
    last = len(pair.row.ids) - 2  # before the closing [SEP]
    assert pair.characters([first, first], [last, first]) == ([0, 0], [len(passage), len("the")])
    assert encoder.pairs(encoder.texts(["what red ?"])[0], [passage], 64) == [pair]


def test_a_passage_too_long_for_the_question_beside_it_is_cut_to_fit(encoder: TextEncoder) -> None:
    [long, short] = encoder.pairs("what red ?", ["red " * 200, "red"], 32)
    assert len(long.row.ids) == 32
    assert long.row.ids[-1] == short.row.ids[-1]


def test_a_remembered_passage_gives_the_same_pair_beside_another_question(encoder: TextEncoder, tiny_checkpoint: Path) -> None:
    encoder.pairs("what blue ?", ["the red city"], 64)
    fresh = TextEncoder(load_tokenizer(tiny_checkpoint / "tokenizer.json"))
    assert encoder.pairs("what red ?", ["the red city"], 64) == fresh.pairs("what red ?", ["the red city"], 64)


def test_remembered_passages_are_bounded_in_bytes(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "PASSAGE_CACHE", 20_000)
    encoder = TextEncoder(load_tokenizer(tiny_checkpoint / "tokenizer.json"))
    for n in range(40):
        encoder.pairs("what red ?", ["red " * (10 * n), "blue"], 64)
        assert encoder._passages.bytes <= 20_000
    assert encoder._passages.bytes > 10_000
    before = encoder._passages.bytes
    [pair] = encoder.pairs("what red ?", ["red " * 20_000], 64)  # larger than all that may be remembered
    assert len(pair.row.ids) == 64
    assert encoder._passages.bytes == before


def test_tokens_that_were_kept_are_used_and_make_the_same_pairs(tiny_checkpoint: Path) -> None:
    tokenizer = load_tokenizer(tiny_checkpoint / "tokenizer.json")
    texts = ["the red city", "", "blue " * 80]
    keeping = TextEncoder(tokenizer, "ab" * 32)
    kept = keeping.kept(texts)
    assert keeping.pairs("what red ?", texts, 64, kept) == TextEncoder(tokenizer).pairs("what red ?", texts, 64)
    assert keeping.kept([*texts] * 200) == kept * 200  # more than are encoded at once
    other = keeping.pairs("what red ?", ["one two three"], 64, keeping.kept(["the red city"]))  # so the text is not tokenised
    assert other == keeping.pairs("what red ?", ["the red city"], 64)


@pytest.mark.parametrize("reading", ["cd" * 32, "", "ab" * 32])
def test_tokens_of_another_tokenizer_and_damaged_or_missing_ones_are_made_anew(tiny_checkpoint: Path, reading: str) -> None:
    tokenizer = load_tokenizer(tiny_checkpoint / "tokenizer.json")
    texts = ["the red city", "blue river", "the king"]
    foreign, whole, damaged = TextEncoder(tokenizer, "ef" * 32).kept(["one two"]) + TextEncoder(tokenizer, "ab" * 32).kept(texts[1:])
    found = TextEncoder(tokenizer, reading).pairs("what red ?", texts, 64, [foreign, whole, damaged[:-1]])
    assert found == TextEncoder(tokenizer).pairs("what red ?", texts, 64)
    assert TextEncoder(tokenizer, reading).pairs("what red ?", texts, 64, [b"", b"\xab" * 8, b"\xab" * 100]) == found


def test_special_tokens_written_in_a_text_are_text(encoder: TextEncoder) -> None:
    plain, tricky = encoder.texts(["red", "red [SEP]"])
    assert tricky.ids.count(plain.ids[-1]) == 1


def validate(
    encoder: TextEncoder,
    texts: list[str],
    *,
    max_tokens: int = 8,
    truncate: bool = False,
    not_utf8: frozenset[tuple[str, int]] = frozenset(),
):  # type: ignore[no-untyped-def]
    config = ServerConfig(max_texts=4, max_text_bytes=100)
    validating = validate_texts(
        "texts", texts, not_utf8, config=config, encoder=encoder, max_tokens=max_tokens, truncate=truncate, way_out=SPLIT
    )
    return asyncio.run(validating)


def test_a_bad_text_among_good_ones_fails_alone_and_is_named(encoder: TextEncoder) -> None:
    valid = validate(encoder, ["red", "  ", "red " * 20, "blue"])
    assert valid.kept == [0, 3]
    assert {at: error.field for at, error in valid.errors.items()} == {1: "texts[1]", 2: "texts[2]"}
    assert "20 tokens exceed the limit of 6" in str(valid.errors[2])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("\n\t ", "empty"),
        ("é" * 60, "120 bytes exceed the limit of 100"),
        ("red " * 20, "set truncate"),
        ("\x00\x01", "no word"),
    ],
)
def test_a_bad_text_alone_fails_the_request(encoder: TextEncoder, text: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        validate(encoder, [text])


def test_truncation_keeps_the_beginning_and_the_closing_token(encoder: TextEncoder) -> None:
    valid = validate(encoder, ["red " * 20], truncate=True)
    whole = encoder.texts(["red " * 20])[0]
    assert list(valid.rows[0].ids) == [*whole.ids[:7], whole.ids[-1]]


def test_a_text_that_was_not_utf8_is_refused_by_name(encoder: TextEncoder) -> None:
    valid = validate(encoder, ["red", ""], not_utf8=frozenset({("texts", 1)}))
    assert "UTF-8" in str(valid.errors[1])


@pytest.mark.parametrize("texts", [[], ["red"] * 5])
def test_no_texts_and_too_many_texts_are_refused(encoder: TextEncoder, texts: list[str]) -> None:
    with pytest.raises(InvalidRequest):
        validate(encoder, texts)


@pytest.mark.parametrize("value", [0, -1, 101, 2**31 - 1])
def test_a_number_outside_its_range_is_refused_with_both_bounds(value: int) -> None:
    with pytest.raises(InvalidRequest, match=f"{value} is outside 1 to 100"):
        bounded("top_k", value, 5, 1, 100)


def test_long_requests_are_tokenised_beside_the_loop_a_part_at_a_time(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenise, seen = encoder.texts, list[tuple[int, bool]]()

    def watched(texts: Sequence[str]) -> list[Row]:
        seen.append((len(texts), threading.current_thread() is threading.main_thread()))
        return tokenise(texts)

    monkeypatch.setattr(encoder, "texts", watched)
    config = ServerConfig(max_texts=100, max_text_bytes=100_000)

    def rows(texts: list[str]) -> list[Row]:
        validating = validate_texts("texts", texts, frozenset(), config=config, encoder=encoder, max_tokens=8, truncate=True)
        return asyncio.run(validating).rows

    texts = [f"red {'blue ' * number}" for number in range(60)]
    found = rows(texts)
    assert seen == [(60, True)]
    monkeypatch.setattr(validation, "_AT_ONCE", 1_000)
    seen.clear()
    assert rows(texts) == found
    assert sum(count for count, _ in seen) == 60
    assert len(seen) > 5
    assert not any(here for _, here in seen)


def test_a_caller_who_hangs_up_costs_no_more_than_the_part_under_way(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenise, parts = encoder.texts, list[int]()
    begun, go_on = threading.Event(), threading.Event()

    def held(texts: Sequence[str]) -> list[Row]:
        parts.append(len(texts))
        begun.set()
        go_on.wait(10)
        return tokenise(texts)

    async def hang_up() -> None:
        config = ServerConfig(max_texts=100, max_text_bytes=100_000)
        texts = ["red " * 5_000] * 50
        task = asyncio.create_task(validate_texts("texts", texts, frozenset(), config=config, encoder=encoder, max_tokens=8, truncate=True))
        await asyncio.to_thread(begun.wait, 10)  # the loop is free meanwhile
        task.cancel()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    monkeypatch.setattr(encoder, "texts", held)
    asyncio.run(hang_up())
    assert parts == [1]
