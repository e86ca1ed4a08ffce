"""Rows of unlike length into batches and forward passes that pad little."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

Example = TypeVar("Example")
CHUNK_TOKENS = 4096  # padded tokens a forward pass; larger falls out of the processor's cache


def length_chunks(lengths: Sequence[int], budget: int = CHUNK_TOKENS) -> list[list[int]]:
    """Row numbers sorted by length, cut so that a chunk, padded to its longest row, keeps to `budget` tokens or holds one row."""
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    chunks: list[list[int]] = []
    for row in order:
        if chunks and (len(chunks[-1]) + 1) * lengths[row] <= budget:
            chunks[-1].append(row)
        else:
            chunks.append([row])
    return chunks


def restored(chunks: Sequence[Sequence[int]]) -> list[int]:
    """Where each row stands among the chunks' rows laid end to end: indexing by it brings back the order before `length_chunks`."""
    flat = [row for chunk in chunks for row in chunk]
    back = [0] * len(flat)
    for place, row in enumerate(flat):
        back[row] = place
    return back


def length_grouped(examples: Iterable[Example], length: Callable[[Example], int], size: int, rng: random.Random) -> list[list[Example]]:
    """Shuffled batches of examples of similar length: shuffle, sort within pools of 32 batches, shuffle the batches."""
    shuffled = list(examples)
    rng.shuffle(shuffled)
    batches = []
    for at in range(0, len(shuffled), size * 32):
        pool = sorted(shuffled[at : at + size * 32], key=length)
        batches += [pool[i : i + size] for i in range(0, len(pool), size)]
    rng.shuffle(batches)
    return batches
