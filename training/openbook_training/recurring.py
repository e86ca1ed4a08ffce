"""Questions made of unlabelled text: spans that recur in a passage (Ram et al. 2021, "Splinter", section 3).

Where a span stands in two sentences of a passage, one of the sentences, with the span replaced by [MASK], becomes a question
that the rest of the passage answers: its gold are the span's other occurrences. Splinter masks the span where it stands
and reads its passage alone; here the sentence moves to the question's place, so that the reader sees exactly the shape it
is served with (as Glass et al. 2020 do with retrieved passages), and the span head is trained too.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from openbook_training.sentences import sentence_spans

LONGEST = 10  # words of a span, as in the paper
_WORD = re.compile(r"[^\W_]+(?:[\-.,][^\W_]+)*")
# Words that carry little meaning by themselves: a span of them alone is no answer, and none begins or ends with one.
FUNCTION_WORDS = frozenset(
    "a about above after again against all also although am among an and another any are around as at be became because become been"
    " before being below between both but by can could d did do does doing down during each either else even ever every few for from"
    " further had has have having he her here hers herself him himself his how however i if in into is it its itself just later less"
    " like ll made make many may me might more most much must my myself neither no nor not now of off often on only onto or other"
    " others our ours out over own per rather re s same she should since so some still such t than that the their theirs them themselves"
    " then there these they this those though through thus to together too toward towards under until up upon us used using ve very was"
    " we well were what when where whether which while who whom whose why will with within without would yet you your yours".split()
)


@dataclass(frozen=True, slots=True)
class Cloze:
    """A question made of a sentence of a passage, to be answered from the rest of the passage."""

    question: str
    passage: str
    answers: tuple[str, ...]  # the span as it is spelt in `passage`


@dataclass(frozen=True, slots=True)
class _Word:
    text: str  # folded
    start: int
    end: int
    sentence: int


def clozes(passage: str, mask: str) -> list[Cloze]:
    """Every cloze of a passage: for each recurring span, each sentence that leaves it standing in another one.

    Args:
        mask: what stands in a question for the span.
    """
    sentences = list(sentence_spans(passage))
    words = [
        _Word(match[0].casefold(), start + match.start(), start + match.end(), number)
        for number, (start, end) in enumerate(sentences)
        for match in _WORD.finditer(passage[start:end])
    ]
    made = []
    for places in _recurring(words):
        spans = [(words[at].start, words[at + length - 1].end) for at, length in places]
        standing = {words[at].sentence for at, _ in places}
        for number in sorted(standing) if len(standing) > 1 else []:
            start, end = sentences[number]
            inside = [span for span in spans if start <= span[0] < end]
            rest = [passage[a:b] for a, b in spans if not start <= a < end]
            question, at = "", start
            for a, b in inside:
                question, at = question + passage[at:a] + mask, b
            question += passage[at:end].rstrip()
            made.append(Cloze(question, (passage[:start] + passage[end:]).strip(), tuple(dict.fromkeys(rest))))
    return made


def _recurring(words: list[_Word]) -> Iterator[list[tuple[int, int]]]:
    """Places (first word, words) of each span that recurs, but for those that recur only within a longer one that does."""
    known: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for at, word in enumerate(words):
        for length in range(1, min(LONGEST, len(words) - at) + 1):
            last = words[at + length - 1]
            if last.sentence != word.sentence:
                break
            if word.text not in FUNCTION_WORDS and last.text not in FUNCTION_WORDS:
                known[tuple(w.text for w in words[at : at + length])].append(at)
    covered: set[tuple[int, int]] = set()  # places (first word, words) inside of a longer span that recurs
    for span in sorted((span for span, places in known.items() if len(places) > 1), key=len, reverse=True):
        places = known[span]
        fresh = [at for at in places if (at, len(span)) not in covered]
        for at in places:
            covered.update((at + skip, length) for skip in range(len(span)) for length in range(1, len(span) - skip + 1))
        if fresh:
            yield [(at, len(span)) for at in places]
