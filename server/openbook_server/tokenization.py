"""Text to token ids and back to characters, by the bundle's own tokenizer and templates.

Nothing is ever cut silently: a text too long for its model is refused (or cut where the caller asks for it). Special
tokens written out in a text ("[SEP]") are text.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from tokenizers import Tokenizer

from openbook_server.packed import pack, unpack_ids, unpack_offsets
from openbook_server.rows import Row

PASSAGE_CACHE = 100_000  # passages whose tokens are kept, about 850 bytes each


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


@dataclass(slots=True)
class Pair:
    """A question beside a passage, and how to get from tokens back to the passage's characters."""

    row: Row
    first: int  # the passage's first token in the row
    packed: bytes  # the passage's tokens, those included that were cut
    _offsets: tuple[list[int], list[int]] | None = field(default=None, init=False, compare=False, repr=False)  # once asked for

    def characters(self, first: int, last: int) -> tuple[int, int]:
        """(start, end) in the passage of the row's tokens first to last, both inclusive and both the passage's."""
        if self._offsets is None:
            self._offsets = unpack_offsets(self.packed)
        starts, ends = self._offsets
        return starts[first - self.first], ends[last - self.first]


class _Frame:
    """The tokenizer's template of a pair, read off an example: special tokens and segments around any question and passage."""

    def __init__(self, tokenizer: Tokenizer) -> None:
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
    """Tokenises for both models; passages are remembered, packed, for the good ones are read again and again."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._passages: OrderedDict[bytes, bytes] = OrderedDict()  # by digest of the text, packed
        self.special_tokens: int = tokenizer.num_special_tokens_to_add(is_pair=False)
        self.pair_special_tokens: int = tokenizer.num_special_tokens_to_add(is_pair=True)
        self._frame = _Frame(tokenizer)

    def texts(self, texts: Sequence[str]) -> list[Row]:
        """One row a text, special tokens included."""
        return [Row(encoding.ids) for encoding in self._tokenizer.encode_batch_fast(list(texts))]

    def token(self, number: int) -> str:
        """The text of a token; empty where the vocabulary has none of that number."""
        return self._tokenizer.id_to_token(number) or ""

    def cut(self, row: Row, max_tokens: int) -> Row:
        """The row's first tokens and its closing special token, `max_tokens` in all."""
        return Row([*row.ids[: max_tokens - 1], row.ids[-1]])

    def pairs(self, question: str, passages: Sequence[str], max_tokens: int) -> list[Pair]:
        """The question beside each passage, which is cut to what fits in `max_tokens`."""
        asked = self._tokenizer.encode(question, add_special_tokens=False).ids
        room = max_tokens - len(asked) - self.pair_special_tokens
        before = self._frame.before(asked)
        return [Pair(self._frame.row(before, unpack_ids(packed, room)), len(before.ids), packed) for packed in self._packed(passages)]

    def _packed(self, texts: Sequence[str]) -> list[bytes]:
        """The tokens of passages, packed; the ones read last are remembered."""
        keys = [blake2b(text.encode(), digest_size=16).digest() for text in texts]
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._passages}
        encodings = self._tokenizer.encode_batch(list(new.values()), add_special_tokens=False)
        for key, encoding in zip(new, encodings, strict=True):
            self._passages[key] = pack(encoding.ids, encoding.offsets)
        for key in keys:
            self._passages.move_to_end(key)
        found = [self._passages[key] for key in keys]
        while len(self._passages) > PASSAGE_CACHE:
            self._passages.popitem(last=False)
        return found
