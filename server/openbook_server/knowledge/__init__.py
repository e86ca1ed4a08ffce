"""The knowledge base: passages, their vectors and their words, durable and searchable.

interface  what every knowledge base does
embedded   in a folder: one SQLite file is the truth, the hnswlib graph beside it is derived from it
elastic    in Elasticsearch
building   a generation filled from what is stored, and published
opening    which of them a user's word means
"""

from openbook_server.knowledge.filters import Filter
from openbook_server.knowledge.fusion import depth, looks_closely, relevance
from openbook_server.knowledge.interface import KnowledgeBase
from openbook_server.knowledge.opening import open_knowledge_base
from openbook_server.knowledge.records import Counts, Document, Hit, Passage, PassageVectors, SearchOptions
from openbook_server.knowledge.windows import QUESTION_TOKENS, Signs, edges, pack, signs

__all__ = [
    "QUESTION_TOKENS",
    "Counts",
    "Document",
    "Filter",
    "Hit",
    "KnowledgeBase",
    "Passage",
    "PassageVectors",
    "SearchOptions",
    "Signs",
    "depth",
    "edges",
    "looks_closely",
    "open_knowledge_base",
    "pack",
    "relevance",
    "signs",
]
