"""Texts to unit vectors in PyTorch: the embedder as it is trained, and the reference that the exported graph must match."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from openbook_training.checkpoint import Checkpoint
from openbook_training.chunks import CHUNK_TOKENS, length_chunks, restored
from openbook_training.pooling import pool
from openbook_training.pretrained import fast_tokenizer

TITLE_TOKENS, SEPARATOR = 32, "\n"  # as the server puts a title before its passage; a test holds the two together


class TextEncoder:
    """Texts as token ids by the tokenizer's own template; what is over the limit is cut before the closing special token."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        tokenizer = fast_tokenizer(checkpoint)
        self._tokenizer = tokenizer.backend_tokenizer
        self.pad: int = tokenizer.pad_token_id or 0

    def rows(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        """Token ids of each text, at most `max_tokens`, special tokens included."""
        return [cut(encoding.ids, max_tokens) for encoding in self._tokenizer.encode_batch(list(texts))]

    def passage_text(self, title: str, text: str) -> str:
        """What is embedded of a passage: its title, where it has one, and the text below it."""
        if not title:
            return text
        return self.beginning(title, TITLE_TOKENS) + SEPARATOR + text

    def beginning(self, text: str, max_tokens: int) -> str:
        """The text as far as its first `max_tokens` tokens, at least one, reach; all of it where it has no more."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return text if len(encoding.ids) <= max_tokens else text[: encoding.offsets[max_tokens - 1][1]]


def cut(ids: list[int], max_tokens: int) -> list[int]:
    """The first `max_tokens` ids, the last of which stays the closing special token."""
    return ids if len(ids) <= max_tokens else [*ids[: max_tokens - 1], ids[-1]]


def encode(
    model: nn.Module,
    rows: Sequence[list[int]],
    *,
    pooling: str,
    pad: int,
    device: torch.device,
    chunk_tokens: int = CHUNK_TOKENS,
    recompute: bool = False,
    report: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Unit vectors (len(rows), d) float32 of rows of token ids, in chunks of similar length.

    Args:
        chunk_tokens: padded tokens of a chunk.
        recompute: keep no activations of a chunk; its forward pass is taken again when its gradient is wanted. That is
            gradient caching (Gao et al. 2021): only the vectors of a large batch are held at once, and of the activations
            those of one chunk, while the gradients stay those of one pass over the whole batch.
        report: told how many rows are done, after each chunk.
    """
    chunks = length_chunks([len(row) for row in rows], chunk_tokens)
    parts: list[Tensor] = []
    done = 0
    for chunk in chunks:
        width = len(rows[chunk[-1]])
        ids = torch.tensor([rows[row] + [pad] * (width - len(rows[row])) for row in chunk], device=device)
        mask = torch.tensor([[1] * len(rows[row]) + [0] * (width - len(rows[row])) for row in chunk], device=device)
        if recompute:
            parts.append(recomputed(_vectors, model, ids, mask, pooling, use_reentrant=False))
        else:
            parts.append(_vectors(model, ids, mask, pooling))
        done += len(chunk)
        report(done)
    return torch.cat(parts)[torch.tensor(restored(chunks), device=device)]


def _vectors(model: nn.Module, ids: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """(B, L) token ids and mask to (B, d) unit vectors; pooled in float32, for bf16 keeps 8 bits of a sum."""
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
    return nn.functional.normalize(pool(states, mask, pooling), dim=1)
