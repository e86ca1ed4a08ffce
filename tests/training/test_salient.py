"""Salient spans by rules, and sentences whose spans can be hidden."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from openbook_training.checkpoint import resolve_checkpoint
from openbook_training.heads import RowEncoder
from openbook_training.masked_sentences import maskable_sentences
from openbook_training.salient import capitalised, salient_spans


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Melbourne Airport, at Tullamarine, is the gateway of Australia.", ["Melbourne Airport", "Tullamarine", "Australia"]),
        ("The United Kingdom won in July 1969 and on 29 November 1952.", ["United Kingdom", "July 1969", "29 November 1952"]),
        ("They met on June 3, 2008, in the 1930s, in the 19th century and in 60 BC.", ["June 3, 2008", "1930s", "19th century", "60 BC"]),
        ("It earned $31.5 billion, 12,366 francs and 7% of all.", ["$31.5 billion", "12,366", "7%"]),
        ("Football moved J. R. Smith at the University of East Anglia.", ["J. R. Smith", "University of East Anglia"]),
        ("We saw Paris and London.", ["Paris", "London"]),
        ("Most of it is used in the US by NATO.", ["US", "NATO"]),
        ("However, it was in his time that He rose.", []),
        ("Industry grew, and may march on.", []),
        ("", []),
        ("... !!! 'x'", []),
    ],
)
def test_dates_numbers_and_names_are_salient(text: str, expected: list[str]) -> None:
    spans = salient_spans(text)
    assert [text[slice(*span)] for span in spans] == expected
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))


def test_a_sentences_first_word_is_a_name_where_it_is_written_like_one_elsewhere() -> None:
    sentences = ["Yunnan was conquered.", "They left Yunnan."]
    assert salient_spans(sentences[0]) == []
    assert [sentences[0][slice(*span)] for span in salient_spans(sentences[0], capitalised(sentences))] == ["Yunnan"]


def test_a_sentence_keeps_the_tokens_of_each_span_it_can_hide(tiny_checkpoint: Path) -> None:
    encoder = RowEncoder(resolve_checkpoint(str(tiny_checkpoint)), max_tokens=16)
    long = "the king of the city who read a book by the river was in case 1490"  # its span is cut off
    passages = ["The king read a book of Red River in 1490. It is a book of the king. He is 12.", f"{long}.", "Is it by Ωmega ?", ""]
    found = maskable_sentences(encoder, passages)
    assert [len(sentences) for sentences in found] == [1, 0, 0, 0]  # "He is 12." has too few words, and one name cannot be spelt
    [sentence] = found[0]
    assert (sentence.passage, sentence.folded) == (0, "the king read a book of red river in 1490.")
    tokens = [[encoder.tokenizer.id_to_token(sentence.text.ids[at]) for at in word] for word in sentence.text.words]
    assert tokens == [["red", "river"], ["1", "##4", "##9", "##0"]]
