"""Sentences of passages in which a salient span can be hidden, as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from openbook_training.heads import RowEncoder
from openbook_training.inverse_cloze import SHORTEST, folded
from openbook_training.masking import Text
from openbook_training.salient import capitalised, salient_spans
from openbook_training.sentences import sentence_spans


@dataclass(frozen=True, slots=True)
class MaskableSentence:
    """A sentence, where it is from, and its salient spans."""

    passage: int
    folded: str  # as passages that hold it are told by
    text: Text  # its "words" are the positions of each salient span


def maskable_sentences(encoder: RowEncoder, passages: Sequence[str]) -> list[list[MaskableSentence]]:
    """Of each passage the sentences with a salient span; none where it has no such sentence.

    A span that the encoder's `max_tokens` cut off, or that the tokenizer cannot spell, is none.
    """
    sentences = [
        (number, passage[slice(*span)].strip(), familiar)
        for number, passage in enumerate(passages)
        for spans in [list(sentence_spans(passage))]
        for familiar in [capitalised([passage[slice(*span)] for span in spans])]
        for span in spans
    ]
    kept = [
        (number, text, spans) for number, text, familiar in sentences if (spans := salient_spans(text, familiar)) and _is_long(text, spans)
    ]
    found: list[list[MaskableSentence]] = [[] for _ in passages]
    encoded = encoder.tokenizer.encode_batch([text for _, text, _ in kept])
    for (number, text, spans), encoding in zip(kept, encoded, strict=True):
        positions = [_positions(encoding, span) for span in spans]
        usable = [places for places in positions if places and not encoder.special.intersection(encoding.ids[at] for at in places)]
        if usable:
            found[number].append(MaskableSentence(number, folded(text), Text(str(number), encoding.ids, usable)))
    return found


def _is_long(text: str, spans: Sequence[tuple[int, int]]) -> bool:
    """Whether enough words are left to tell what is asked, whichever span is hidden."""
    longest = max(len(text[slice(*span)].split()) for span in spans)
    return len(text.split()) >= SHORTEST + longest


def _positions(encoding: Any, span: tuple[int, int]) -> list[int]:
    """Tokens of a span, all or none: none where the sentence was cut within it."""
    offsets: list[tuple[int, int]] = encoding.offsets
    places = [at for at, (start, end) in enumerate(offsets) if start < end and start < span[1] and end > span[0]]
    return places if places and offsets[places[-1]][1] >= span[1] else []
