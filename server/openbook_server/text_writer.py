"""One text written, end to end: what Generate does between a prompt or a question and the text that follows.

    language model   (search ->) passages, the best one last, and the prompt -> token by token
    generator        search -> encoder on question and passage, each alone -> token by token beside all of them

A coroutine a text: each token is a row of the engine like any other, so texts that are being written share batches with each other, keep
to deadlines, and take turns with questions. gRPC is not known here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

import numpy as np
from tokenizers import Tokenizer

from openbook_server.decoding import LOGITS, Decoder, Step
from openbook_server.errors import Overloaded
from openbook_server.models import Models
from openbook_server.sampling import choose
from openbook_server.tokenization import TextEncoder
from openbook_server.work import Work
from openbook_server.writers import WriterInfo

MOST_AT_ONCE = 32  # texts; each holds keys and values, in a GPT-2 of 12 layers 73 kB a token
_UNFINISHED = "\ufffd"  # what decoding gives for a part of a character


class Finish(Enum):
    """Why a text ends."""

    END = 1  # the model ended it
    LENGTH = 2  # it has as many tokens as were asked for
    STOP = 3  # a stop string was written


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How a text is written."""

    max_tokens: int
    temperature: float  # 0 = the most probable token at each step
    top_p: float
    seed: int
    stop: tuple[str, ...]  # the text ends before the first of them


@dataclass(frozen=True, slots=True)
class Piece:
    """What was written since the last piece."""

    text: str
    tokens: int  # written so far
    whole: str  # so far
    finish: Finish | None  # of the last piece


class TextWriter:
    """Writes with one model of a bundle."""

    def __init__(self, info: WriterInfo, tokenizer: Tokenizer, decoder: Decoder, models: Models) -> None:
        self.info, self.tokenizer, self._decoder, self._models = info, tokenizer, decoder, models
        self._encoder = TextEncoder(tokenizer)
        self.newline: list[int] = tokenizer.encode("\n", add_special_tokens=False).ids
        self._writing = 0

    @contextmanager
    def place(self, deadline: float) -> Iterator[None]:
        """Within, one of the texts that may be written at once, until `deadline`.

        Raises:
            Overloaded: there are as many already.
        """
        if self._writing >= MOST_AT_ONCE:
            raise Overloaded(f"{MOST_AT_ONCE} texts are being written; try again in 1 s", retry_after_seconds=1.0)
        self._writing += 1
        try:
            with self._models.attended(deadline):
                yield
        finally:
            self._writing -= 1

    def ids(self, text: str) -> list[int]:
        """Tokens of a text, no special ones added."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def prompt_room(self, passages: int) -> int:
        """Tokens that prompt and text may have together, beside so many passages of any length; of a language model."""
        return self.info.max_tokens - 1 - passages * (self.info.passage_tokens + len(self.newline))

    def question_room(self) -> int:
        """Tokens of the longest question, so that passages are what is cut; of a generator."""
        return (self.info.max_tokens - self._encoder.pair_special_tokens) // 2

    def query(self, prompt: Sequence[int]) -> str:
        """The end of a prompt, by which passages are looked up."""
        return str(self.tokenizer.decode(list(prompt[-self.info.query_tokens :]))).strip()

    def go_on(self, prompt: Sequence[int], passages: Sequence[str], sampling: Sampling, work: Work) -> AsyncIterator[Piece]:
        """What a language model writes after a prompt, beside passages, the best of which comes first here and last there."""
        read = [self.info.start_token]
        for passage in reversed(passages):
            read += [*self.ids(passage)[: self.info.passage_tokens], *self.newline]
        first = Step([*read, *prompt], text=self._decoder.begin())
        return self._write(("language_model.prompt", "language_model"), first, sampling, work)

    async def answer(self, question: str, passages: Sequence[str], sampling: Sampling, work: Work) -> AsyncIterator[Piece]:
        """What a generator writes of a question and its passages; the last piece's `whole` takes the characters of a passage where its
        tokens stand in one and no stop string is in them, for a WordPiece tokenizer cannot tell "3.5" from "3. 5"."""
        pairs = self._encoder.pairs(question, passages, self.info.max_tokens)
        rows = [pair.row for pair in pairs] or self._encoder.texts([question])
        work.tokenise_ms += work.lap()
        read = await self._models.read("generator_encoder", rows, work)
        source = {}
        for name in self._decoder.sources:
            found = name.replace("past_key_values.", "present.")
            parts = [np.asarray(one[found], np.float32)[:, : row.tokens] for one, row in zip(read, rows, strict=True)]
            source[name] = np.concatenate(parts, axis=1)
        source_ids = [token for row in rows for token in row.ids]
        first = Step([self.info.start_token], text=self._decoder.begin(source, source_ids))
        ids: list[int] = []
        async for piece in self._write(("generator_decoder", "generator_decoder"), first, sampling, work, ids):
            if piece.finish is Finish.STOP or piece.finish is None:
                yield piece
            else:
                found = self._as_in(passages, ids)
                if any(stop in found for stop in sampling.stop):
                    found = ""  # the text as written holds none, and may have been sent beyond where this one would end
                yield Piece(piece.text, piece.tokens, found or piece.whole, piece.finish)

    async def _write(
        self, graphs: tuple[str, str], step: Step, sampling: Sampling, work: Work, ids: list[int] | None = None
    ) -> AsyncIterator[Piece]:
        """Token by token; `graphs` reads the first step, and all later ones; `ids` is told what was written."""
        random, text, graph = np.random.default_rng(sampling.seed), step.written, graphs[0]
        ids = [] if ids is None else ids
        shown, finish = "", None
        while finish is None:
            [outputs] = await self._models.read(graph, [step], work)
            logits = np.asarray(outputs[LOGITS], np.float32)
            token = choose(logits, temperature=sampling.temperature, top_p=sampling.top_p, random=random)
            if token == self.info.end_token:
                finish = Finish.END
            else:
                ids.append(token)
                finish = Finish.LENGTH if len(ids) == sampling.max_tokens else None
            whole = self.tokenizer.decode(ids)
            if places := [at for stop in sampling.stop if (at := whole.find(stop)) >= 0]:
                whole, finish = whole[: min(places)], Finish.STOP
            safe = whole if finish is not None else whole[: _settled(whole, sampling.stop)]
            new = safe[len(shown) :] if safe.startswith(shown) else ""  # a tokenizer may join words otherwise when more follows
            shown += new
            if new or finish is not None:
                yield Piece(new, len(ids), whole if finish is not None else shown, finish)
            step, graph = Step([token], text=text), graphs[1]

    def _as_in(self, passages: Sequence[str], ids: Sequence[int]) -> str:
        """The characters of the first passage in which these tokens stand; "" where they stand in none."""
        encodings = self.tokenizer.encode_batch(list(passages), add_special_tokens=False) if ids else []
        for passage, encoding in zip(passages if ids else (), encodings, strict=True):
            for at in range(len(encoding.ids) - len(ids) + 1):
                if encoding.ids[at : at + len(ids)] == list(ids):
                    return passage[encoding.offsets[at][0] : encoding.offsets[at + len(ids) - 1][1]].strip()
        return ""


def _settled(text: str, stops: Sequence[str]) -> int:
    """How many of the characters stay whatever follows: a part of a character, or of a stop string, may become something else."""
    text = text.rstrip(_UNFINISHED)
    begun = [length for stop in stops for length in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:length])]
    return len(text) - max(begun, default=0)
