"""Pairs of texts are rows of one form, whatever kind of tokenizer makes them, and those that the reader is trained on."""

from __future__ import annotations

from pathlib import Path

import pytest
from openbook_training.checkpoint import resolve_checkpoint
from openbook_training.errors import CheckpointNotFound
from openbook_training.heads import RowEncoder
from openbook_training.pair_template import own_separators, set_pair_template
from openbook_training.reader import PairEncoder
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

QUESTION, PASSAGE = "what was red ?", "The city of kings,  and a book - in 3 cafés."
SEPARATORS = {"bert": 1, "distilbert": 1, "mpnet": 2, "roberta": 2, "xlm-roberta": 2}  # that the tokenizers of a kind use by themselves
KINDS = pytest.mark.parametrize("kind", SEPARATORS)


@pytest.fixture
def folders(tiny_checkpoint: Path, tiny_kinds: dict[str, Path]) -> dict[str, Path]:
    return {"bert": tiny_checkpoint, **tiny_kinds}


def tokenizer_of(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@KINDS
@pytest.mark.parametrize("separators", [1, 2])
def test_a_pair_has_its_separators_and_says_of_each_token_whose_it_is(folders: dict[str, Path], kind: str, separators: int) -> None:
    tokenizer = tokenizer_of(folders[kind])
    bare = [tokenizer.encode(text, add_special_tokens=False) for text in (QUESTION, PASSAGE)]
    cls, sep = (tokenizer.encode("a").ids[at] for at in (0, -1))
    assert own_separators(tokenizer, kind, segments=False) == SEPARATORS[kind]
    set_pair_template(tokenizer, kind, separators=separators)
    for one in (tokenizer, Tokenizer.from_str(tokenizer.to_str())):  # as a bundle brings it
        pair = one.encode(QUESTION, PASSAGE)
        assert pair.ids == [cls, *bare[0].ids, *[sep] * separators, *bare[1].ids, sep]
        assert pair.type_ids == [0] * (len(bare[0].ids) + 1 + separators) + [1] * (len(bare[1].ids) + 1)
        assert one.encode(QUESTION).ids == [cls, *bare[0].ids, sep]
        assert one.num_special_tokens_to_add(is_pair=True) == 2 + separators
        again = one.encode(PASSAGE, add_special_tokens=False)
        assert (again.ids, again.offsets) == (bare[1].ids, bare[1].offsets)
    assert all(PASSAGE[a:b] == PASSAGE[a:b].strip() for a, b in bare[1].offsets)


@KINDS
def test_the_reader_is_trained_on_such_rows(folders: dict[str, Path], kind: str) -> None:
    checkpoint, tokenizer = resolve_checkpoint(str(folders[kind])), tokenizer_of(folders[kind])
    for separators in (1, 2):
        set_pair_template(tokenizer, kind, separators=separators)
        encoder = PairEncoder(checkpoint, max_tokens=100, stride=4, max_question_tokens=24, separators=separators)
        [pair] = encoder.pairs(QUESTION, [PASSAGE], 0)
        row = tokenizer.encode(QUESTION, PASSAGE)
        assert pair.ids == row.ids
        assert pair.first == row.type_ids.index(1)
        assert pair.offsets == [offset for offset, side in zip(row.offsets, row.sequence_ids, strict=True) if side == 1]


@KINDS
def test_a_verifier_is_trained_on_such_rows(folders: dict[str, Path], kind: str) -> None:
    tokenizer = tokenizer_of(folders[kind])
    set_pair_template(tokenizer, kind)
    row = tokenizer.encode(QUESTION, PASSAGE)
    assert RowEncoder(resolve_checkpoint(str(folders[kind])), max_tokens=100).rows([(QUESTION, PASSAGE)]) == [(row.ids, row.type_ids)]
    own = tokenizer_of(folders[kind]).encode(QUESTION, PASSAGE)
    encoder = RowEncoder(resolve_checkpoint(str(folders[kind])), max_tokens=100, own_template=True)
    assert encoder.rows([(QUESTION, PASSAGE)]) == [(own.ids, own.type_ids)]


def test_a_tokenizer_that_makes_such_pairs_by_itself_stays_as_it_is(tiny_checkpoint: Path) -> None:
    tokenizer = tokenizer_of(tiny_checkpoint)
    before = tokenizer.to_str()
    set_pair_template(tokenizer, "tiny")
    assert tokenizer.to_str() == before


def test_a_tokenizer_whose_texts_or_pairs_are_of_no_such_form_is_refused(tiny_kinds: dict[str, Path]) -> None:
    special = {"special_tokens": [("<s>", 0), ("</s>", 2)]}
    tokenizer = tokenizer_of(tiny_kinds["roberta"])
    with pytest.raises(
        CheckpointNotFound, match=r"'x': its tokenizer makes <s> a </s> </s> a </s> of a pair, with type ids \[0, 0, 0, 0, 0, 0\]"
    ):
        own_separators(tokenizer, "x", segments=True)
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", pair="<s> $A </s> <s> $B </s>", **special)
    with pytest.raises(CheckpointNotFound, match=r"makes <s> a </s> <s> a </s> of a pair"):
        own_separators(tokenizer, "x", segments=False)
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", pair="$A $B </s>", **special)
    with pytest.raises(CheckpointNotFound, match=r"checkpoint 'x': its tokenizer makes a </s> of a text; it takes \[CLS\] a \[SEP\]"):
        set_pair_template(tokenizer, "x")
