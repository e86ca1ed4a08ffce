"""Documents to what the knowledge base stores of them: digests, passages with their tokens, and what need not be stored again.

The same for `openbook index` and for writes over gRPC, so that either leaves alone what the other has stored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from openbook_server.bundle import Bundle
from openbook_server.errors import InvalidRequest, PassageTooLong
from openbook_server.ingest.embed import TITLE_TOKENS
from openbook_server.ingest.parts import Parts
from openbook_server.ingest.splitting import split
from openbook_server.knowledge import Document, KnowledgeBase, Passage
from openbook_server.tokenization import TextEncoder

PASSAGE_TOKENS = 200
OVERLAP = 40
_KEPT_AT_ONCE = 256  # passages whose tokens are made in one part
FACTS = ("passage_tokens", "overlap")  # under which a knowledge base records how its documents were split


@dataclass(frozen=True, slots=True)
class Splitting:
    """How documents become passages."""

    passage_tokens: int  # longest passage, special tokens not included
    overlap: int  # tokens that neighbouring passages may share

    def facts(self) -> dict[str, str]:
        """As a knowledge base records it, so that later writes split alike."""
        return dict(zip(FACTS, (str(self.passage_tokens), str(self.overlap)), strict=True))


def choose_splitting(
    bundle: Bundle, recorded: Mapping[str, str], passage_tokens: int | None = None, overlap: int | None = None
) -> Splitting:
    """What the caller asks for, else what the knowledge base was built with, else the default.

    A passage must fit whole into the embedder, beside its title, and into the reader, beside the longest question.

    Args:
        recorded: those of the knowledge base's facts that `FACTS` names.

    Raises:
        InvalidRequest: a value is out of range.
    """
    most = longest_passage(bundle)
    if passage_tokens is None:
        passage_tokens = max(1, min(most, int(recorded.get("passage_tokens", PASSAGE_TOKENS))))
    if not 1 <= passage_tokens <= most:
        raise InvalidRequest("--passage-tokens", f"{passage_tokens} is outside 1 to {most}, what this bundle's models read whole")
    if overlap is None:
        overlap = min(int(recorded.get("overlap", OVERLAP)), passage_tokens // 4)
    if not 0 <= overlap < passage_tokens:
        raise InvalidRequest("--overlap", f"{overlap} is outside 0 to {passage_tokens - 1}")
    return Splitting(passage_tokens, overlap)


def longest_passage(bundle: Bundle) -> int:
    """Tokens of the longest passage that a bundle's models read whole, special tokens not included."""
    most = bundle.embedder.max_tokens - TITLE_TOKENS - 3
    return min(most, bundle.reader.max_tokens - bundle.reader.max_question_tokens - 3) if bundle.reader is not None else most


def check_stored_passages(bundle: Bundle, recorded: Mapping[str, str]) -> None:
    """Whether passages as they are stored suit a bundle; those are no longer split where its generation is built from them.

    A bundle with another tokenizer counts otherwise: of each passage its own encoder has the last word, see `PassageEncoder`.

    Raises:
        PassageTooLong: they may be longer than its models read whole.
    """
    stored, most = int(recorded.get("passage_tokens", 0)), longest_passage(bundle)
    if stored > most:
        raise PassageTooLong(
            f"the stored passages have up to {stored} tokens, this bundle's models read {most} of one whole; documents must be split "
            f"again: openbook index BUNDLE NEW-KB SOURCES... --passage-tokens {most}"
        )


def digested(documents: Iterable[Document], splitting: Splitting) -> list[tuple[Document, str]]:
    """Documents, each with the digest of its content and of its way of being split."""
    return [(document, _digest(document, splitting)) for document in documents]


def unstored(documents: Sequence[tuple[Document, str]], stored: Mapping[str, str]) -> list[tuple[Document, str]]:
    """Those that are new or changed, by the digests of what is stored."""
    return [(document, digest) for document, digest in documents if stored.get(document.id) != digest]


def passages_of(documents: Sequence[Document], encoder: TextEncoder, splitting: Splitting) -> Parts[list[Passage]]:
    """All passages of all of them, in order, with their tokens."""
    split_up = yield from split(documents, encoder.tokenizer, passage_tokens=splitting.passage_tokens, overlap=splitting.overlap)
    passages = [passage for passages in split_up for passage in passages]
    for at in range(0, len(passages), _KEPT_AT_ONCE):
        if at:
            yield
        part = passages[at : at + _KEPT_AT_ONCE]
        kept = encoder.kept([passage.text for passage in part])
        passages[at : at + _KEPT_AT_ONCE] = [replace(passage, tokens=tokens) for passage, tokens in zip(part, kept, strict=True)]
    return passages


def replaced_sources(documents: Sequence[Document], knowledge_base: KnowledgeBase) -> dict[str, str]:
    """By the ids of those documents that would take the place of what came from another source, that source."""
    kept = knowledge_base.documents([document.id for document in documents])
    before = {document.id: kept[document.id][0].source if kept.get(document.id) else document.source for document in documents}
    return {document.id: before[document.id] for document in documents if before[document.id] != document.source}


def _digest(document: Document, splitting: Splitting) -> str:
    parts = [document.title, document.text, document.source, dict(document.metadata), splitting.passage_tokens, splitting.overlap]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
