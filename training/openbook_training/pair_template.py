"""How two texts are read together: [CLS] a [SEP] b [SEP], with `type_ids` of 1 from b on, by tokenizers of every kind.

BERT's do so by themselves. Those of RoBERTa and its kin put two separators between the texts, and do not tell in `type_ids` which of the
two a token is of, as scoring must know even where a model knows no segments. One form for all kinds lets a reader of one kind teach one
of another, window by window. It goes into a bundle's tokenizer.json, so that a server builds the rows that training built.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer
from tokenizers.processors import ByteLevel, PostProcessor, Sequence, TemplateProcessing

from openbook_training.errors import CheckpointNotFound


def set_pair_template(tokenizer: Tokenizer, name: str, *, separators: int = 1) -> None:
    """Let `tokenizer` make pairs in the form above; one that does so already stays as it is.

    Args:
        name: of its checkpoint, for the message.
        separators: between the two texts; other than one only where a model was trained so elsewhere.

    Raises:
        CheckpointNotFound: a text alone is not [CLS] a [SEP] to it.
    """
    cls, body, sep = _text(tokenizer, name)
    pair = tokenizer.encode("a", "a")
    before, after = [cls, *body, *[sep] * separators], [*body, sep]
    if (pair.ids, pair.type_ids) == (before + after, [0] * len(before) + [1] * len(after)):
        return
    opening, closing = tokenizer.id_to_token(cls), tokenizer.id_to_token(sep)
    template = TemplateProcessing(
        single=[opening, "$A", closing],
        pair=[opening, "$A", *[closing] * separators, "$B:1", f"{closing}:1"],
        special_tokens=[(opening, cls), (closing, sep)],
    )
    tokenizer.post_processor = Sequence([*_trimming(json.loads(tokenizer.to_str())["post_processor"]), template])


def own_separators(tokenizer: Tokenizer, name: str, *, segments: bool) -> int:
    """How many separators it puts between two texts by itself.

    Args:
        segments: the model takes `type_ids`, so that its own must be those of the form above.

    Raises:
        CheckpointNotFound: its pairs are of no such form, with whatever number of separators.
    """
    cls, body, sep = _text(tokenizer, name)
    pair = tokenizer.encode("a", "a")
    count = len(pair.ids) - 2 * len(body) - 2
    before, after = [cls, *body, *[sep] * count], [*body, sep]
    if pair.ids != before + after or (segments and pair.type_ids != [0] * len(before) + [1] * len(after)):
        raise CheckpointNotFound(
            f"checkpoint {name!r}: its tokenizer makes {' '.join(pair.tokens)} of a pair, with type ids {pair.type_ids}; it takes "
            "[CLS] a [SEP] b [SEP], with 0 for a and 1 for b where the model knows segments"
        )
    return count


def _text(tokenizer: Tokenizer, name: str) -> tuple[int, list[int], int]:
    """What it makes of a text: the opening special token, the text's tokens, the closing special token."""
    encoding = tokenizer.encode("a")
    body = encoding.ids[1:-1]
    if not body or encoding.special_tokens_mask != [1, *[0] * len(body), 1]:
        raise CheckpointNotFound(f"checkpoint {name!r}: its tokenizer makes {' '.join(encoding.tokens)} of a text; it takes [CLS] a [SEP]")
    return encoding.ids[0], body, encoding.ids[-1]


def _trimming(processor: dict[str, Any]) -> Iterator[PostProcessor]:
    """What a post-processor does beside its template: it takes the space before a word out of the word's characters."""
    for part in processor.get("processors", [processor]):
        if part.get("trim_offsets"):
            yield ByteLevel(add_prefix_space=part["add_prefix_space"], trim_offsets=True)
