"""Text to token ids and back to characters, by the bundle's own tokenizer and templates.

Nothing is ever cut silently: a text too long for its model is refused (or cut where the caller asks for it). Special
tokens written out in a text ("[SEP]") are text.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from openbook_server.packed import is_packed, pack, unpack_ids, unpack_offsets
from openbook_server.recency import Recent
from openbook_server.rows import Row

PASSAGE_CACHE = 80 << 20  # bytes of passages' tokens that are remembered: some 100,000 of 150 tokens each
_ENTRY_BYTES = 250  # of Python's objects around one
_ENCODED_AT_ONCE = 256  # passages; some 14 kB each until they are packed
MARK_BYTES = 8  # of the tokenizer's digest, before tokens that are kept

Positions = Sequence[int] | NDArray[np.generic]  # of tokens in a row


def load_tokenizer(file: Path) -> Tokenizer:
    """The bundle's tokenizer with padding and truncation off and special tokens in texts taken as text."""
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return tokenizer


@dataclass(frozen=True, slots=True)
class _Before:
    """Of a row, what stands before its passage."""

    ids: array[int]
    types: array[int]


@dataclass(frozen=True, slots=True)
class Pair:
    """A question beside a passage, and how to get from tokens back to the passage's characters."""

    row: Row
    first: int  # the passage's first token in the row
    packed: bytes  # the passage's tokens, those included that were cut

    def characters(self, first: Positions, last: Positions) -> tuple[list[int], list[int]]:
        """Where spans from one of the row's tokens to another, inclusive and all of them the passage's, start and end in the passage."""
        starts, ends = unpack_offsets(self.packed)
        return starts[np.asarray(first, np.int64) - self.first].tolist(), ends[np.asarray(last, np.int64) - self.first].tolist()


class _Frame:
    """The tokenizer's template of a pair, read off an example: special tokens and segments around any question and passage."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        alone = tokenizer.encode("a").sequence_ids
        self.inside = slice(alone.index(0), -alone[::-1].index(0) or None)  # of a text's row, without its special tokens
        example = tokenizer.encode("a", "a")
        ids, types, sides = array("q", example.ids), array("B", example.type_ids), example.sequence_ids  # None = a special token
        question, passage = sides.index(0), sides.index(1)
        asked, read = sides.count(0), sides.count(1)
        self._head, self._middle, self._tail = slice(question), slice(question + asked, passage), slice(passage + read, None)
        self._ids, self._types = ids, types
        self._question_type, self._passage_type = types[question : question + 1], types[passage : passage + 1]

    def before(self, question: Sequence[int]) -> _Before:
        """What stands before the passage."""
        ids, types = self._ids, self._types
        return _Before(
            ids[self._head] + array("q", question) + ids[self._middle],
            types[self._head] + self._question_type * len(question) + types[self._middle],
        )

    def row(self, before: _Before, passage: array[int]) -> Row:
        return Row(before.ids + passage + self._ids[self._tail], before.types + self._passage_type * len(passage) + self._types[self._tail])


class TextEncoder:
    """Tokenises for both models.

    A passage's tokens are made once: where it is stored, and kept with it (`kept`); of one that brings none they are remembered,
    for the good ones are read again and again.
    """

    def __init__(self, tokenizer: Tokenizer, digest: str = "") -> None:
        """`digest`: of the tokenizer, in hexadecimal; tokens kept under another one, or all of them where it is empty, are not used."""
        self.tokenizer = tokenizer
        self._mark = bytes.fromhex(digest)[:MARK_BYTES]
        self._vocabulary: int = tokenizer.get_vocab_size()
        self._passages: Recent[bytes, bytes] = Recent(PASSAGE_CACHE, lambda _, packed: len(packed) + _ENTRY_BYTES)  # by digest of the text
        self.special_tokens: int = tokenizer.num_special_tokens_to_add(is_pair=False)
        self.pair_special_tokens: int = tokenizer.num_special_tokens_to_add(is_pair=True)
        self._frame = _Frame(tokenizer)

    def kept(self, texts: Sequence[str]) -> list[bytes]:
        """Tokens of passages as a knowledge base keeps them: packed, after the first bytes of the tokenizer's digest."""
        kept = []
        for at in range(0, len(texts), _ENCODED_AT_ONCE):  # of a huge document the tokenizer's objects would fill the memory
            encodings = self.tokenizer.encode_batch(list(texts[at : at + _ENCODED_AT_ONCE]), add_special_tokens=False)
            kept += [self._mark + pack(encoding.ids, encoding.offsets) for encoding in encodings]
        return kept

    def texts(self, texts: Sequence[str]) -> list[Row]:
        """One row a text, special tokens included."""
        return [Row(encoding.ids) for encoding in self.tokenizer.encode_batch_fast(list(texts))]

    def token(self, number: int) -> str:
        """The text of a token; empty where the vocabulary has none of that number."""
        return self.tokenizer.id_to_token(number) or ""

    def cut(self, row: Row, max_tokens: int) -> Row:
        """The row's first tokens and its closing special token, `max_tokens` in all."""
        return Row([*row.ids[: max_tokens - 1], row.ids[-1]])

    def pairs(self, question: str | Row, passages: Sequence[str], max_tokens: int, kept: Sequence[bytes] = ()) -> list[Pair]:
        """The question beside each passage, which is cut to what fits in `max_tokens`.

        Args:
            question: a text, or its row, which spares tokenising it again.
            kept: tokens of each passage as they were stored with it, if at all; those of another tokenizer and damaged ones are made anew.
        """
        if isinstance(question, Row):
            asked = question.ids[self._frame.inside]
        else:
            asked = self.tokenizer.encode(question, add_special_tokens=False).ids
        room = max_tokens - len(asked) - self.pair_special_tokens
        before = self._frame.before(asked)
        return [Pair(self._frame.row(before, unpack_ids(packed, room)), len(before.ids), packed) for packed in self._packed(passages, kept)]

    def _packed(self, texts: Sequence[str], kept: Sequence[bytes]) -> list[bytes]:
        """The tokens of passages, packed."""
        found = [self._usable(stored) for stored in kept] or [None] * len(texts)
        made = iter(self._remembered([text for text, packed in zip(texts, found, strict=True) if packed is None]))
        return [next(made) if packed is None else packed for packed in found]

    def _usable(self, stored: bytes) -> bytes | None:
        """What was packed, if it was by this tokenizer."""
        packed = stored[MARK_BYTES:]
        return packed if self._mark and stored.startswith(self._mark) and is_packed(packed, self._vocabulary) else None

    def _remembered(self, texts: Sequence[str]) -> list[bytes]:
        """As `_packed`, of passages that bring no tokens; the ones read last are remembered."""
        keys = [blake2b(text.encode(), digest_size=16).digest() for text in texts]
        found = {key: packed for key in keys if (packed := self._passages.get(key)) is not None}
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in found}
        encodings = self.tokenizer.encode_batch(list(new.values()), add_special_tokens=False)
        for key, encoding in zip(new, encodings, strict=True):
            found[key] = packed = pack(encoding.ids, encoding.offsets)
            self._passages.put(key, packed)
        return [found[key] for key in keys]
