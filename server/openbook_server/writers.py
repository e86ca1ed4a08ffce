"""The models of a bundle that write text: a generator, in an encoder's and a decoder's graph, and a language model, in one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

WRITERS = {"generator": ("generator_encoder", "generator_decoder"), "language_model": ("language_model",)}  # -> their graphs
RESERVED = frozenset({"embedder", "reader", *WRITERS, *(model for models in WRITERS.values() for model in models)})  # no names of heads


@dataclass(frozen=True, kw_only=True, slots=True)
class WriterInfo:
    """What a caller of a text-writing model's graphs must know; the manifest states more of how its input is made."""

    architecture: str  # bert2bert, t5, bart; gpt2
    max_tokens: int  # longest question + passage of a generator; of a language model, all that is read and written
    passages: int  # that it was trained beside, and reads at most
    passage_tokens: int  # of each, of a language model; a generator's share max_tokens with the question
    query_tokens: int  # of the end of a prompt that passages are looked up by, of a language model
    max_answer_tokens: int  # that it was trained to write, the end included, of a generator
    start_token: int  # what an answer or a text begins with
    end_token: int
    tokenizer: str  # file name; it need not be the bundle's
    graphs: Mapping[str, Mapping[str, str]]  # model name -> precision -> file name
