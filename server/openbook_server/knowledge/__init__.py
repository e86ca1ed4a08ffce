"""The knowledge base: passages, their vectors and their words, on disk and searchable.

One SQLite file is the truth; the hnswlib graph beside it is derived from it and rebuilt whenever it is missing or torn.
"""

from openbook_server.knowledge.filters import Filter
from openbook_server.knowledge.knowledge_base import KnowledgeBase, open_knowledge_base
from openbook_server.knowledge.records import Counts, Document, Hit, Passage, SearchOptions

__all__ = ["Counts", "Document", "Filter", "Hit", "KnowledgeBase", "Passage", "SearchOptions", "open_knowledge_base"]
