"""Decoders as the engine sees them: rows of tokens in, logits of what follows out, keys and values remembered between.

Promises
- What is written for a text never depends on what is written beside it: how far keys and values are padded follows from the text's own
  length, and no product has a single row (a product of one row and of several add in another order).
- A step that failed left its text as it was, and may be made again.

Each text holds its own keys and values, and a batch is put together from them by copying: as much as one token's pass through the model
reads of each of its texts. It knows nothing of sampling or of characters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from openbook_server.binding import Arrays
from openbook_server.buckets import Buckets
from openbook_server.engine import Runnable
from openbook_server.rows import Row
from openbook_server.runtime import Graph
from openbook_server.writers import WriterInfo

SOURCE_IDS = "encoder_input_ids"  # (rows, source tokens), of a decoder that points into them
LOGITS = "token_logits"  # (rows, vocabulary) of the token that follows
# Texts in the same step of lengths share a batch; a step as long as this costs little padding beside a pass through the model.
GROWING = Buckets(((64, 64), (256, 128)), 256)
EXACT = Buckets((), 1)

Floats = NDArray[np.float32]


class Written:
    """Keys and values of one text: what was read of it, by layer; and, of an encoder's, what it is written from."""

    def __init__(self, shapes: Sequence[tuple[int, int]], capacity: int, source: Mapping[str, Floats], source_ids: Sequence[int]) -> None:
        """Args:
        shapes: (heads, dim) of each array of keys or values.
        capacity: tokens at most.
        source: (heads, tokens, dim) by the names that the decoder takes them by.
        source_ids: the tokens that they are of.
        """
        self.arrays = [np.zeros((heads, capacity, dim), np.float32) for heads, dim in shapes]
        self.length, self.capacity, self.source, self.source_ids = 0, capacity, source, source_ids

    def add(self, arrays: Sequence[Floats]) -> None:
        """(heads, tokens, dim) each."""
        end = self.length + arrays[0].shape[1]
        for kept, new in zip(self.arrays, arrays, strict=True):
            kept[:, self.length : end] = new
        self.length = end


@dataclass(frozen=True, slots=True)
class Step(Row):
    """Tokens to read after what was read of a text."""

    text: Written | None = None

    @property
    def written(self) -> Written:
        if self.text is None:
            raise TypeError("a step has a text")
        return self.text

    @property
    def tokens(self) -> int:
        """Keys and values that the step works on."""
        return self.written.length + len(self.ids)


class Decoder:
    """One decoder's graph; `Prompts` and `Steps`, or `SourcedSteps`, are what the engine runs of it."""

    def __init__(self, graph: Graph, *, capacity: int) -> None:
        """`capacity`: tokens of the longest text."""
        self.graph, self.capacity = graph, capacity
        self.past = [name for name in graph.input_names if name.startswith("past_key_values.") and ".encoder." not in name]
        self.present = [name.replace("past_key_values.", "present.") for name in self.past]
        self.sources = [name for name in graph.input_names if ".encoder." in name]
        self.points = SOURCE_IDS in graph.input_names  # into what the encoder read
        self.growing = replace(GROWING, longest=capacity)
        self._shapes = [graph.heads_and_dim(name) for name in self.past]

    def begin(self, source: Mapping[str, Floats] | None = None, source_ids: Sequence[int] = ()) -> Written:
        """A text of which nothing was read yet; see `Written`."""
        return Written(self._shapes, self.capacity, source or {}, source_ids)

    def empty(self, rows: int) -> Arrays:
        """Keys and values of nothing."""
        return {name: np.zeros((rows, heads, 0, dim), np.float32) for name, (heads, dim) in zip(self.past, self._shapes, strict=True)}

    def stacked(self, texts: Sequence[Written], width: int) -> Arrays:
        """Keys and values of texts, padded on the left to `width` tokens."""
        arrays: Arrays = {}
        for at, (name, (heads, dim)) in enumerate(zip(self.past, self._shapes, strict=True)):
            stacked = np.zeros((len(texts), heads, width, dim), np.float32)
            for row, text in enumerate(texts):
                stacked[row, :, width - text.length :] = text.arrays[at][:, : text.length]
            arrays[name] = stacked
        return arrays

    def run(self, steps: Sequence[Step], inputs: Arrays) -> Arrays:
        """Run a batch whose last tokens are the steps' own, and keep what it leaves."""
        outputs = self.graph.run(inputs)
        for row, step in enumerate(steps):
            step.written.add([_floats(outputs[name])[row, :, -len(step.ids) :] for name in self.present])
        return {LOGITS: outputs["logits"][: len(steps), -1]}


class Prompts:
    """A language model's first reading of texts, padded on the left."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.buckets = decoder.growing

    def run_rows(self, rows: Sequence[Row], length: int) -> Arrays:
        steps = _steps(rows)
        ids, mask, places = (np.zeros((len(steps), length), np.int64) for _ in range(3))
        for at, step in enumerate(steps):
            ids[at, length - len(step.ids) :] = step.ids
            mask[at, length - len(step.ids) :] = 1
            places[at, length - len(step.ids) :] = np.arange(len(step.ids))
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
        return self._decoder.run(steps, inputs | self._decoder.empty(len(steps)))


class Steps:
    """A language model's next token of texts of about one length."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.buckets = decoder.growing

    def run_rows(self, rows: Sequence[Row], length: int) -> Arrays:
        steps = _steps(rows)
        several = [*steps, *steps[:1]] if len(steps) == 1 else steps
        mask = np.zeros((len(several), length), np.int64)
        for at, step in enumerate(several):
            mask[at, length - step.tokens :] = 1
        inputs: Arrays = {
            "input_ids": np.array([step.ids for step in several], np.int64),
            "position_ids": np.array([[step.written.length] for step in several], np.int64),
            "attention_mask": mask,
        }
        return self._decoder.run(steps, inputs | self._decoder.stacked([step.written for step in several], length - 1))


class SourcedSteps:
    """A generator's next token of answers of one length, each beside the keys and values of its own passages."""

    buckets = EXACT  # the graph has no mask over what was written

    def __init__(self, decoder: Decoder, *, source_tokens: int) -> None:
        """`source_tokens`: of all passages together at most; all are padded to it."""
        self._decoder, self._source_tokens = decoder, source_tokens

    def run_rows(self, rows: Sequence[Row], length: int) -> Arrays:
        steps = _steps(rows)
        several = [*steps, *steps[:1]] if len(steps) == 1 else steps
        mask = np.zeros((len(several), self._source_tokens), np.int64)
        sources: Arrays = {}
        for name in self._decoder.sources:
            heads, _, dim = steps[0].written.source[name].shape
            stacked = np.zeros((len(several), heads, self._source_tokens, dim), np.float32)
            for at, step in enumerate(several):
                found = step.written.source[name]
                stacked[at, :, : found.shape[1]] = found
                mask[at, : found.shape[1]] = 1
            sources[name] = stacked
        inputs: Arrays = {"input_ids": np.array([step.ids for step in several], np.int64), "encoder_attention_mask": mask}
        if self._decoder.points:
            inputs[SOURCE_IDS] = np.zeros_like(mask)
            for at, step in enumerate(several):
                inputs[SOURCE_IDS][at, : len(step.written.source_ids)] = step.written.source_ids
        return self._decoder.run(steps, inputs | sources | self._decoder.stacked([step.written for step in several], length - 1))


def decoders_of(writers: Mapping[str, WriterInfo], graphs: Mapping[str, Graph]) -> tuple[dict[str, Decoder], dict[str, Runnable]]:
    """Of a bundle's models that write: decoders by the model's name, and what the engine runs by the graph's.

    Args:
        graphs: by the names of `WRITERS`.
    """
    decoders: dict[str, Decoder] = {}
    runnables: dict[str, Runnable] = {}
    for name, info in writers.items():
        if name == "language_model":
            decoder = decoders[name] = Decoder(graphs[name], capacity=info.max_tokens)
            runnables |= {"language_model.prompt": Prompts(decoder), name: Steps(decoder)}
        else:
            decoder = decoders[name] = Decoder(graphs["generator_decoder"], capacity=info.max_answer_tokens + 1)
            steps = SourcedSteps(decoder, source_tokens=max(1, info.passages) * info.max_tokens)
            runnables |= {"generator_encoder": graphs["generator_encoder"], "generator_decoder": steps}
    return decoders, runnables


def _steps(rows: Sequence[Row]) -> list[Step]:
    steps = [row for row in rows if isinstance(row, Step)]
    if len(steps) != len(rows):
        raise TypeError("a decoder reads steps")
    return steps


def _floats(values: NDArray[np.generic]) -> Floats:
    return np.asarray(values, np.float32)
