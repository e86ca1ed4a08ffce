"""Splitting: nothing lost, nothing too long, every offset true."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from openbook_server.ingest import splitting
from openbook_server.ingest.parts import at_once
from openbook_server.ingest.splitting import sentences
from openbook_server.knowledge import Document, Passage
from openbook_server.tokenization import load_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

PIECES = [
    "red blue. ",
    "The king! ",
    'He said "one." ',
    "e.g. two ",
    "Dr. Book was 3.5 tall. ",
    "\n\n",
    "x" * 90 + " ",
    "río — ½ 東京。 ",
    "\t",
    "A. B. c? ",
]


def split(documents: Sequence[Document], tokenizer: Tokenizer, *, passage_tokens: int, overlap: int) -> list[list[Passage]]:
    return at_once(splitting.split(documents, tokenizer, passage_tokens=passage_tokens, overlap=overlap))


@pytest.fixture
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return load_tokenizer(tiny_checkpoint / "tokenizer.json")


@pytest.mark.parametrize("seed", range(40))
def test_every_character_is_in_a_passage_that_keeps_to_the_limit_and_is_a_slice_of_its_document(tokenizer: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choices(PIECES, k=rng.randrange(0, 60)))
    limit = rng.randrange(2, 40)
    [passages] = split([Document(id="d", text=text, title="t")], tokenizer, passage_tokens=limit, overlap=rng.randrange(0, limit))
    covered = set()
    for number, passage in enumerate(passages):
        assert passage.id == f"d#{number}"
        assert text[passage.start : passage.start + len(passage.text)] == passage.text
        assert passage.text == passage.text.strip() != ""
        assert len(tokenizer.encode(passage.text, add_special_tokens=False).ids) <= limit + 1  # a cut may split a word's pieces
        covered |= set(range(passage.start, passage.start + len(passage.text)))
    assert all(at in covered for at, character in enumerate(text) if not character.isspace())
    starts = [passage.start for passage in passages]
    assert starts == sorted(set(starts))


def test_neighbours_share_their_last_whole_sentences(tokenizer: Tokenizer) -> None:
    text = "Red is one. Blue is two. Green is three. The king is a book. The city is red."
    [passages] = split([Document(id="d", text=text)], tokenizer, passage_tokens=10, overlap=5)
    assert [passage.text for passage in passages[:2]] == ["Red is one. Blue is two.", "Blue is two. Green is three."]


def test_sentences_end_at_full_stops_but_not_at_initials_abbreviations_or_numbers() -> None:
    text = 'Dr. A. Smith paid 3.5 million. "Really?" he asked. Then, e.g. now, it ended.\n\nnext block'
    assert [text[a:b] for a, b in sentences(text)] == [
        "Dr. A. Smith paid 3.5 million.",
        '"Really?" he asked.',
        "Then, e.g. now, it ended.",
        "next block",
    ]


@pytest.fixture
def syllables() -> Tokenizer:
    """Of WordPiece in which a syllable of Hangul is two tokens or three, as it is in BERT's vocabulary."""
    pieces = [chr(code) for code in (*range(0x1100, 0x1113), *range(0x1161, 0x1176), *range(0x11A8, 0x11C3))]
    vocabulary = {piece: number for number, piece in enumerate(["[UNK]", *pieces, *(f"##{piece}" for piece in pieces)])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.NFD()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("seed", range(5))
def test_a_character_of_several_tokens_is_in_one_passage_and_counted_there(syllables: Tokenizer, limit: int, seed: int) -> None:
    text = "".join(random.Random(seed).choices("각난가나 ", k=300)).strip()
    [passages] = split([Document(id="d", text=text)], syllables, passage_tokens=limit, overlap=0)
    assert "".join(passage.text for passage in passages).replace(" ", "") == text.replace(" ", "")
    for passage in passages:
        assert len(syllables.encode(passage.text).ids) <= limit or len(passage.text) == 1


@pytest.mark.parametrize("blank", ["\n\n", "\r\n\r\n", "\n \t\n", "\r\n\r\n\r\n"])
def test_a_blank_line_ends_a_sentence_even_behind_an_abbreviation(blank: str) -> None:
    text = f"It was Mr.{blank}Smith came. Then Mr.\r\nJones did."
    assert [text[a:b] for a, b in sentences(text)] == ["It was Mr.", "Smith came.", "Then Mr.\r\nJones did."]


def test_a_document_without_text_has_no_passages(tokenizer: Tokenizer) -> None:
    assert split([Document(id="d", text=" \n ")], tokenizer, passage_tokens=10, overlap=2) == [[]]


def test_a_text_longer_than_what_is_tokenised_at_once_is_split_as_if_it_were_not(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [Document(id=f"d{n}", text="".join(random.Random(n).choices(PIECES, k=80))) for n in range(5)]
    whole = split(documents, tokenizer, passage_tokens=20, overlap=6)
    monkeypatch.setattr(splitting, "_PART_CHARACTERS", 100)
    assert split(documents, tokenizer, passage_tokens=20, overlap=6) == whole


ENDLESS = {
    "a word": "x" * 100_000,
    "words": ("x" * 150 + " ") * 800,
    "white space": "red" + " " * 50_000 + "blue" + "\n" * 50_000 + "one",
    "words, white space and sentences": "x" * 30_000 + " " + "red " * 5_000 + "y" * 9_000 + " " * 9_000 + "The king. " * 900,
    "no tokens": "\u200b" * 60_000,
}


@pytest.mark.parametrize("limit", [3, 50, 300])
@pytest.mark.parametrize("kind", ENDLESS)
def test_what_never_ends_is_cut_into_passages_of_bounded_size(tokenizer: Tokenizer, kind: str, limit: int) -> None:
    text = ENDLESS[kind]
    [passages] = split([Document(id="d", text=text)], tokenizer, passage_tokens=limit, overlap=limit // 4)
    assert max(len(passage.text) for passage in passages) <= max(20 * limit, 4_000)
    assert max(end - start for start, end in sentences(text)) <= 4_000
    assert all(text[passage.start : passage.start + len(passage.text)] == passage.text for passage in passages)
    covered = {at for passage in passages for at in range(passage.start, passage.start + len(passage.text))}
    assert all(at in covered for at, character in enumerate(text) if not character.isspace())


def test_ordinary_text_is_cut_by_its_tokens_alone(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [Document(id=f"d{n}", text="".join(random.Random(n).choices(PIECES, k=300))) for n in range(5)]
    bounded = split(documents, tokenizer, passage_tokens=60, overlap=12)
    monkeypatch.setattr(splitting, "_CHARACTERS_A_TOKEN", 1_000_000)
    assert split(documents, tokenizer, passage_tokens=60, overlap=12) == bounded
