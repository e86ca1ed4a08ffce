"""Rows made from packed passages are those that the tokenizer itself makes, whatever it is and whatever the texts are."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from openbook_server.packed import is_packed, pack, unpack_ids, unpack_offsets
from openbook_server.tokenization import TextEncoder, load_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

TEXTS = [
    "",
    " ",
    "red",
    "the red city, the blue river",
    "  \n\n\t red" + " " * 400 + "blue",  # runs longer than four bits hold
    "x" * 90 + " red " + "y" * 300,
    "Ünïcödé: naïve café — “quoted”, 北京 is a city; ½ 𝕏 👩‍👩‍👧 e\u0301 \u200b\ufeff\x00 end",
    "[SEP] [CLS] are text",
    Path(__file__).read_text(),
]
ALPHABET = "abcdefgh red blue.,;- \n\tÄßçñ东京👍🏽\u0301\u00a0\x07"
MOST = 64


def byte_level() -> Tokenizer:
    """Of several tokens for one character, which share its offsets; segments and special tokens as BERT's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["[CLS]", "[SEP]"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    return tokenizer


@pytest.fixture(params=["wordpiece", "byte level"])
def tokenizer(request: pytest.FixtureRequest, tiny_checkpoint: Path) -> Tokenizer:
    return byte_level() if request.param == "byte level" else load_tokenizer(tiny_checkpoint / "tokenizer.json")


def expected(tokenizer: Tokenizer, question: str, text: str) -> tuple[list[int], list[int], list[tuple[int, int]], int]:
    """(ids, segments, the passage's offsets, the row of its first token) as the tokenizer alone makes them."""
    asked = tokenizer.encode(question, add_special_tokens=False)
    passage = tokenizer.encode(text, add_special_tokens=False)
    passage.truncate(MOST - len(asked.ids) - tokenizer.num_special_tokens_to_add(is_pair=True))
    both = tokenizer.post_process(asked, passage, add_special_tokens=True)
    inside = [at for at, side in enumerate(both.sequence_ids) if side == 1]
    return both.ids, both.type_ids, [both.offsets[at] for at in inside], inside[0] if inside else -1


def check(tokenizer: Tokenizer, encoder: TextEncoder, question: str, texts: Sequence[str]) -> None:
    pairs = encoder.pairs(question, texts, MOST)
    for text, pair in zip(texts, pairs, strict=True):
        ids, types, offsets, first = expected(tokenizer, question, text)
        assert pair.row.types is not None
        assert (list(pair.row.ids), list(pair.row.types)) == (ids, types), text
        inside = [first + at for at in range(len(offsets))]
        assert list(zip(*pair.characters(inside, inside), strict=True)) == offsets, text


def test_pairs_are_what_the_tokenizer_makes_of_real_and_odd_texts(tokenizer: Tokenizer) -> None:
    encoder = TextEncoder(tokenizer)
    for question in ("what red ?", "où est 北京 👍 ?", "a " * 20, "b"):
        check(tokenizer, encoder, question, TEXTS)


def test_pairs_are_what_the_tokenizer_makes_of_random_texts(tokenizer: Tokenizer) -> None:
    drawn = random.Random(0)
    encoder = TextEncoder(tokenizer)
    for _ in range(40):
        texts = ["".join(drawn.choices(ALPHABET, k=drawn.randrange(120))) for _ in range(5)]
        check(tokenizer, encoder, texts[0][:20] or "a", texts + texts[:2])


@pytest.mark.parametrize(
    ("ids", "offsets"),
    [
        ([], []),
        ([0], [(0, 0)]),
        ([65_535, 3], [(0, 15), (30, 45)]),
        ([65_536, 4_294_967_295], [(2, 18), (34, 34)]),
        ([7, 8, 9, 10], [(5, 6), (5, 6), (0, 100_000), (99_999, 2_000_000)]),
    ],
)
def test_what_is_packed_comes_out_again(ids: list[int], offsets: list[tuple[int, int]]) -> None:
    packed = pack(ids, offsets)
    assert list(unpack_ids(packed, 100)) == ids
    assert list(unpack_ids(packed, 1)) == ids[:1]
    assert list(zip(*unpack_offsets(packed), strict=True)) == offsets


def test_common_tokens_take_three_bytes() -> None:
    words = [(6 * at, 6 * at + 5) for at in range(100)]
    assert len(pack(range(1_000, 1_100), words)) <= 3 * 100 + 8


def test_what_the_disk_changed_is_told_from_what_was_packed() -> None:
    packed = pack([5, 70_000, 9], [(0, 4), (4, 90), (91, 95)])
    assert is_packed(packed, 70_001)
    assert is_packed(pack([], []), 1)
    assert not is_packed(packed, 70_000)  # no such token
    for damaged in (b"", packed[:3], packed[:-1], packed + b"x", b"\x03" + packed[1:], packed[:1] + b"\xff" * 4 + packed[5:]):
        assert not is_packed(damaged, 70_001), damaged
    assert not is_packed(packed[:-12] + b"\x03" + packed[-11:], 70_001)  # an exception for a token that there is not
