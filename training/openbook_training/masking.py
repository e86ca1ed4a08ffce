"""Hiding whole words of a text behind [MASK], and how often the pieces of words occur."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openbook_training.heads import RowEncoder

Word = tuple[tuple[int, ...], list[int]]  # its pieces, and where they stand in a text's ids


@dataclass(frozen=True, slots=True)
class Text:
    """A text as token ids, and where the words that may be hidden stand in them."""

    place: str
    ids: list[int]
    words: list[list[int]]  # positions of each word's pieces; at least one word

    def hide(self, share: float, mask: int, rng: random.Random) -> tuple[list[int], list[int]]:
        """The ids with a share of the words hidden, one at least, and the positions hidden, in order.

        All pieces of a word go together (whole-word masking); unlike in BERT every one of them becomes [MASK].
        """
        count = max(1, round(share * len(self.words)))
        hidden = sorted(at for word in rng.sample(self.words, count) for at in word)
        ids = list(self.ids)
        for at in hidden:
            ids[at] = mask
        return ids, hidden


def words_of(encoder: RowEncoder, texts: Sequence[str]) -> list[tuple[list[int], list[Word]]]:
    """Of each text its ids and its words: what has a letter or digit and no special token."""
    encoded = []
    for encoding in encoder.tokenizer.encode_batch(list(texts)):
        places: dict[int, list[int]] = {}
        for at, word in enumerate(encoding.word_ids):
            if word is not None:
                places.setdefault(word, []).append(at)
        words = [(tuple(encoding.ids[at] for at in positions), positions) for positions in places.values()]
        encoded.append((encoding.ids, [word for word in words if _is_word(encoder, word[0])]))
    return encoded


def _is_word(encoder: RowEncoder, pieces: Sequence[int]) -> bool:
    spelling = [encoder.tokenizer.id_to_token(piece) for piece in pieces]
    return not encoder.special.intersection(pieces) and any(c.isalnum() for piece in spelling for c in piece)


def log_frequencies(texts: Sequence[Text], vocabulary: int) -> Tensor:
    """(vocabulary,) log share of every piece among the pieces of the texts' words, one added to each count."""
    counts = torch.ones(vocabulary)
    for text in texts:
        for word in text.words:
            counts.index_add_(0, torch.tensor([text.ids[at] for at in word]), torch.ones(len(word)))
    return torch.log(counts / counts.sum())
