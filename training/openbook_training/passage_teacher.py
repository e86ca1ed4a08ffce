"""A reader that a retriever learns from: how probable it holds it that an answer is in a passage.

The logits of a window are asked for once, and remembered by `teacher.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from openbook_training.adapters import stated_settings
from openbook_training.checkpoint import Checkpoint
from openbook_training.errors import CheckpointNotFound
from openbook_training.objectives import passage_masses, span_scores
from openbook_training.reader import READER_SETTINGS, passage_tokens, stated_windows
from openbook_training.teacher import Teacher


class PassageTeacher:
    """The reader in an adapter's folder, with the limits that it was trained with."""

    def __init__(self, checkpoint: Checkpoint, folder: str, device: torch.device) -> None:
        """Read the adapter in `folder`, of `checkpoint`.

        Raises:
            CheckpointNotFound: there is no such adapter, it is of another checkpoint, or its reader.json states no usable limits.
        """
        stated = stated_settings(Path(folder), READER_SETTINGS, checkpoint)
        limits = [stated.get(name) for name in ("max_tokens", "max_question_tokens", "max_answer_tokens")]
        whole = [limit for limit in limits if isinstance(limit, int) and limit > 0]
        if len(whole) < len(limits) or whole[0] <= whole[1] + 3:
            raise CheckpointNotFound(
                f"{folder}: {READER_SETTINGS} should state max_tokens, max_question_tokens and max_answer_tokens, with room for a passage "
                f"beside the question; it states {limits}"
            )
        max_tokens, max_question_tokens, self._max_answer_tokens = whole
        encoder = stated_windows(checkpoint, max_tokens=max_tokens, max_question_tokens=max_question_tokens)
        self._teacher = Teacher(checkpoint, folder, encoder, device)
        self._device = device

    def masses(self, read: Sequence[tuple[str, Sequence[str]]]) -> Tensor:
        """(passages,) `objectives.passage_masses`, float32, of each question's passages, question by question.

        Args:
            read: each question with its passages, at least one in all.
        """
        pairs = self._teacher.windows(read)
        start, end = self._teacher.own_logits(pairs)
        before = [0]  # passages of the questions before
        for _, passages in read:
            before.append(before[-1] + len(passages))
        owner = torch.tensor([before[pair.question] + pair.passage for pair in pairs], device=self._device)
        context = passage_tokens(pairs, start.shape[1]).to(self._device)
        return passage_masses(span_scores(start, end, context, self._max_answer_tokens), owner, before[-1])
