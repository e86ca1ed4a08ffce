"""REALM: a retriever and a masked language model that reads what it finds, trained as one (Guu et al. 2020).

    x, a sentence with a hidden span -> q(x) -> its k best passages z, and the null passage
    p(z|x) = softmax over those of s(x, z) = q(x)·d(z) / temperature
    p(y|x, z): the language model reads [CLS] x [SEP] z [SEP], in one segment as the reader does, and may copy y from z (pointer.py);
               the null passage is x read alone

Three deviations. q and d are one embedder, for the bundle has one; the paper's are two. The null passage's score is one trained number,
as a neighbour's is in `heads.LabelHead`, where the paper embeds an empty document. And the pointer: to copy a name by way of the vocabulary
is what a language model learns in far more steps than a small machine can make.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn

from openbook_training.checkpoint import Checkpoint
from openbook_training.chunks import length_chunks
from openbook_training.embedding import encode
from openbook_training.heads import RowEncoder, TokenRow
from openbook_training.masked_language_model import MaskedLanguageModel
from openbook_training.objectives import NEGATIVE, neighbour_prior
from openbook_training.pointer import Pointer
from openbook_training.retriever import save_retriever

RETRIEVER, LANGUAGE_MODEL, SETTINGS = "retriever", "language_model", "realm.json"
COPIED = 0.1  # probability that a new pointer copies a hidden token


@dataclass(frozen=True, slots=True)
class Masked:
    """A text some of whose tokens are hidden."""

    ids: list[int]  # special tokens included, [MASK] where a token is hidden
    hidden: list[int]  # positions
    tokens: list[int]  # what stood there


@dataclass(frozen=True, slots=True)
class PassageRows:
    """Passages as token ids: as the retriever embeds them, and as the language model reads them, without special tokens."""

    embedded: list[list[int]]
    read: list[list[int]]


@dataclass(frozen=True, slots=True)
class Reading:
    """What the model says of some texts, in the order of their hidden tokens."""

    prior: Tensor  # (texts, k + 1) log p(z|x), the null passage last
    given: Tensor  # (targets, k + 1) log p(y_j|x, z); 0 where a text has fewer passages
    texts: Tensor  # (targets,) which text each target belongs to


Propose = Callable[[Tensor], list[list[int]]]  # (texts, d) q(x) to the passages of each text, at most k


class Realm(nn.Module):
    """Both models and the null passage's score."""

    def __init__(
        self,
        retriever: PeftModel,
        language_model: MaskedLanguageModel,
        encoder: RowEncoder,
        *,
        pooling: str,
        null_score: float,
        temperature: float,
        pointer: str = "",
    ) -> None:
        """`pointer`: the folder of a language model of REALM, whose pointer is gone on with; empty, or without one: a new one."""
        super().__init__()
        self.retriever, self.language_model = retriever, language_model
        self.pointer = Pointer(int(retriever.config.hidden_size), to_the_right=False, copied=COPIED)
        if pointer:
            self.pointer.load(Path(pointer))
        self.null_score = nn.Parameter(torch.tensor(null_score))
        self._encoder, self._pooling, self._temperature = encoder, pooling, temperature

    def embed(self, rows: Sequence[list[int]], report: Callable[[int], None] = lambda done: None) -> Tensor:
        """(len(rows), d) unit vectors by the retriever as it is now."""
        return encode(self.retriever, rows, pooling=self._pooling, pad=self._encoder.pad, device=self.null_score.device, report=report)

    def forward(self, texts: Sequence[Masked], passages: PassageRows, k: int, propose: Propose, vectors: Tensor | None = None) -> Reading:
        """Retrieve, weigh and read.

        Args:
            texts: with one hidden token at least, each.
            k: passages a text at most.
            propose: what retrieval finds; only which passages it names enters the loss, not by which scores.
            vectors: (passages, d) that d(z) are taken from as they are; None: d(z) by the retriever as it is now, with its gradient.
        """
        queries = self.embed([text.ids for text in texts])
        found = propose(queries.detach())
        rows = sorted({row for of_text in found for row in of_text})
        column_of = {row: column for column, row in enumerate(rows)}
        scores = queries.new_full((len(texts), k), NEGATIVE)
        if rows:
            table = self.embed([passages.embedded[row] for row in rows]) if vectors is None else vectors[rows]
            places = [(number, at, column_of[row]) for number, of_text in enumerate(found) for at, row in enumerate(of_text)]
            x, at, z = (torch.tensor(column, device=queries.device) for column in zip(*places, strict=True))
            with torch.autocast(queries.device.type, enabled=False):  # bf16 would leave a cosine two digits
                scores = scores.index_put((x, at), (queries[x] * table[z]).sum(dim=1))
        prior = neighbour_prior(scores, self.null_score, queries.new_tensor(self._temperature))
        joint = [[_joint(text.ids, passages.read[row]) for row in of_text] for text, of_text in zip(texts, found, strict=True)]
        return Reading(prior, *self._read(texts, joint, k))

    def _read(self, texts: Sequence[Masked], joint: Sequence[Sequence[TokenRow]], k: int) -> tuple[Tensor, Tensor]:
        """`given` and `texts` of a Reading."""
        device = self.null_score.device
        first, targets = [], 0  # the target that each text begins with
        for text in texts:
            first.append(targets)
            targets += len(text.tokens)
        jobs = [(number, slot, row) for number, rows in enumerate(joint) for slot, row in enumerate(rows)]
        jobs += [(number, k, (text.ids, [0] * len(text.ids))) for number, text in enumerate(texts)]
        given = torch.zeros((targets, k + 1), device=device)
        for chunk in length_chunks([len(ids) for _, _, (ids, _) in jobs]):
            inputs = self._encoder.batch([jobs[job][2] for job in chunk], device)
            places = []
            for place, (number, slot, _) in enumerate(jobs[job] for job in chunk):
                text = texts[number]
                pairs = enumerate(zip(text.hidden, text.tokens, strict=True), first[number])
                places += [(place, position, token, target, slot) for target, (position, token) in pairs]
            row, position, token, target, column = (torch.tensor(values, device=device) for values in zip(*places, strict=True))
            states = self.language_model.states(inputs)
            here, read = states[row, position], inputs["token_type_ids"][row]  # 1 where a passage stands
            log_probabilities = self.language_model.predicted(here)
            pointed = self.pointer(
                log_probabilities[:, None], here[:, None], self.pointer.keys(states)[row], inputs["input_ids"][row], read
            )
            given = given.index_put((target, column), pointed[:, 0].gather(1, token[:, None])[:, 0])
        owner = torch.tensor([number for number, text in enumerate(texts) for _ in text.tokens], device=device)
        return given, owner

    def save(self, folder: Path, checkpoint: Checkpoint, *, queries_only: bool) -> None:
        """Write a retriever's folder, a language model's, and what holds them together."""
        save_retriever(self.retriever, folder / RETRIEVER, checkpoint, [int(self.retriever.config.hidden_size)], queries_only=queries_only)
        self.language_model.save(folder / LANGUAGE_MODEL, checkpoint)
        self.pointer.save(folder / LANGUAGE_MODEL)
        stated = {"null_score": self.null_score.item(), "temperature": self._temperature}
        (folder / SETTINGS).write_text(json.dumps(stated, indent=2) + "\n")


def _joint(text: list[int], passage: list[int]) -> TokenRow:
    """[CLS] x [SEP] z [SEP] of the ids of [CLS] x [SEP] and z, in the form of `pair_template`."""
    return [*text, *passage, text[-1]], [0] * len(text) + [1] * (len(passage) + 1)
