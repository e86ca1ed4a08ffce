"""How long a document's id may be, and what it may hold beside its text: all of that stands beside every one of its passages."""

from __future__ import annotations

from openbook_server.knowledge import Document

MAX_ID_BYTES = 512
MAX_STORED_ID_BYTES = 8_192  # of a document that was stored before ids were limited, and can still be read and deleted
MAX_TITLE_BYTES = 2_048  # of which the embedder reads `TITLE_TOKENS`
MAX_SOURCE_BYTES = 4_096  # the longest path of a file
MAX_METADATA = 64  # entries
MAX_METADATA_BYTES = 16_384  # keys and values


def excess(document: Document) -> tuple[str, str] | None:
    """The field that holds too much, or an id that holds nothing, and what is wrong with it; None where none is."""
    if not document.id.strip():
        return "id", "empty, or nothing but white space; give it another one"
    if (size := len(document.id.encode())) > MAX_ID_BYTES:
        return "id", f"{size} bytes exceed the limit of {MAX_ID_BYTES}; give it a shorter one: of a file, index a folder nearer to it"
    for field, text, limit in (("title", document.title, MAX_TITLE_BYTES), ("source", document.source, MAX_SOURCE_BYTES)):
        if (size := len(text.encode())) > limit:
            return field, f"{size} bytes exceed the limit of {limit}; shorten it, or make it part of the text"
    if "" in document.metadata:
        return "metadata", "a key is empty, so no filter can ask for it; name it, or leave it out"
    if (entries := len(document.metadata)) > MAX_METADATA:
        return "metadata", f"{entries} entries exceed the limit of {MAX_METADATA}; leave some out"
    size = sum(len(key.encode()) + len(value.encode()) for key, value in document.metadata.items())
    if size > MAX_METADATA_BYTES:
        return "metadata", f"{size} bytes exceed the limit of {MAX_METADATA_BYTES}; leave some out, or make them part of the text"
    return None
