"""Building a generation from what a knowledge base holds, and publishing it, without a server."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from openbook_server.knowledge.interface import KnowledgeBase
from openbook_server.knowledge.records import Passage, PassageVectors

_FILLED_AT_ONCE = 1_024  # passages embedded between two looks at whether to stop

Embed = Callable[[Sequence[Passage]], PassageVectors]


def build_generation(
    knowledge_base: KnowledgeBase,
    embed: Embed,
    report: Callable[[int, int], None] = lambda filled, passages: None,
    stopping: Callable[[], bool] = lambda: False,
) -> bool:
    """Embed the passages that the knowledge base holds and this generation lacks; returns whether that is done.

    Then it has all that was stored a moment ago, though others may store more all the time.

    Args:
        report: told now and then how many passages the generation has, and how many there are.
        stopping: whether to stop; what was reported is stored, and building again goes on from there.
    """
    [state] = [state for state in knowledge_base.generation_states() if state.name == knowledge_base.generation]
    filled = state.passages
    while not stopping():
        gap = knowledge_base.lacking(_FILLED_AT_ONCE)
        if gap is not None:
            gap.fill(*embed(gap.passages))
            filled += len(gap.passages)
            report(filled, max(filled, state.passages + state.lacking))
        if gap is None or len(gap.passages) < _FILLED_AT_ONCE:
            return True
    return False


def publish_generation(knowledge_base: KnowledgeBase, embed: Embed) -> None:
    """Make it the live one, with what is still lacking; meanwhile nobody writes, and when it fails all is as before.

    Raises:
        As `KnowledgeBase.publish`.
    """
    knowledge_base.hold()
    try:
        while gap := knowledge_base.lacking(_FILLED_AT_ONCE):
            gap.fill(*embed(gap.passages))
        knowledge_base.publish()
    except BaseException:
        knowledge_base.release()
        raise
