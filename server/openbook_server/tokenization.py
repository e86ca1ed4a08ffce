"""Text to token ids and back to characters, by the bundle's own tokenizer and templates.

Nothing is ever cut silently: a text too long for its model is refused (or cut where the caller asks for it). Special
tokens written out in a text ("[SEP]") are text.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from openbook_server.engine import Row

PASSAGE_CACHE = 20_000  # encodings kept, about 5 kB each


def load_tokenizer(file: Path) -> Tokenizer:
    """The bundle's tokenizer with padding and truncation off and special tokens in texts taken as text."""
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return tokenizer


@dataclass(frozen=True, slots=True)
class Pair:
    """A question beside a passage, and how to get from tokens back to the passage's characters."""

    row: Row
    offsets: Sequence[tuple[int, int]]  # per token of the row; characters of the passage for its tokens

    def characters(self, first: int, last: int) -> tuple[int, int]:
        """(start, end) in the passage of tokens first to last, both inclusive."""
        return self.offsets[first][0], self.offsets[last][1]


class TextEncoder:
    """Tokenises for both models; passages are remembered, for the good ones are read again and again."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._passages: OrderedDict[tuple[str, str], Any] = OrderedDict()
        self.special_tokens = tokenizer.num_special_tokens_to_add(is_pair=False)

    def texts(self, texts: Sequence[str]) -> list[Row]:
        """One row a text, special tokens included."""
        return [Row(encoding.ids) for encoding in self._tokenizer.encode_batch_fast(list(texts))]

    def cut(self, row: Row, max_tokens: int) -> Row:
        """The row's first tokens and its closing special token, `max_tokens` in all."""
        return Row([*row.ids[: max_tokens - 1], row.ids[-1]])

    def pairs(self, question: str, passages: Sequence[tuple[str, str]], max_tokens: int) -> list[Pair]:
        """The question beside each (passage id, text), a passage cut to what fits in `max_tokens`."""
        asked = self._tokenizer.encode(question, add_special_tokens=False)
        room = max_tokens - len(asked.ids) - self._tokenizer.num_special_tokens_to_add(is_pair=True)
        new = [key for key in passages if key not in self._passages]
        for key, encoding in zip(new, self._tokenizer.encode_batch([text for _, text in new], add_special_tokens=False), strict=True):
            self._passages[key] = encoding
        pairs = []
        for key in passages:
            self._passages.move_to_end(key)
            passage = self._passages[key]
            if len(passage.ids) > room:
                passage = self._tokenizer.encode(key[1], add_special_tokens=False)
                passage.truncate(room)
            both = self._tokenizer.post_process(asked, passage, add_special_tokens=True)
            pairs.append(Pair(Row(both.ids, both.type_ids), both.offsets))
        while len(self._passages) > PASSAGE_CACHE:
            self._passages.popitem(last=False)
        return pairs
