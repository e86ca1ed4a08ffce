"""Questions made of recurring spans, and a reader trained on them."""

from __future__ import annotations

import io
import random
from pathlib import Path

import pytest
from openbook_training.config import LoopConfig
from openbook_training.errors import InvalidData
from openbook_training.reader import trained_reader
from openbook_training.recurring import clozes
from openbook_training.run import train
from openbook_training.squad import Question, occurrences
from openbook_training.tasks import OBJECTIVES
from openbook_training.tasks.recurring_spans import RecurringSpansConfig, RecurringSpansTask
from rich.console import Console

PASSAGE = (
    "The river Avon rises near Naseby. It flows past Stratford and joins the Severn at Tewkesbury. "
    "At Stratford the river Avon is crossed by two bridges. One of them was built in 1490."
)


def quiet() -> Console:
    return Console(file=io.StringIO())


def test_a_sentence_with_a_recurring_span_becomes_a_question_that_the_rest_answers() -> None:
    made = {(cloze.question, cloze.answers): cloze.passage for cloze in clozes(PASSAGE, "[MASK]")}
    assert set(made) == {
        ("The [MASK] rises near Naseby.", ("river Avon",)),
        ("At Stratford the [MASK] is crossed by two bridges.", ("river Avon",)),
        ("It flows past [MASK] and joins the Severn at Tewkesbury.", ("Stratford",)),
        ("At [MASK] the river Avon is crossed by two bridges.", ("Stratford",)),
    }
    rest = made["The [MASK] rises near Naseby.", ("river Avon",)]
    assert rest == PASSAGE.removeprefix("The river Avon rises near Naseby. ")
    for (_, answers), passage in made.items():
        assert occurrences(passage, answers)


def test_a_span_inside_a_longer_one_that_recurs_is_asked_for_only_where_it_also_stands_alone() -> None:
    text = "Old Sarum Castle fell. They left Old Sarum Castle. {} it was cold."
    assert {answer for cloze in clozes(text.format("Later"), "_") for answer in cloze.answers} == {"Old Sarum Castle"}
    found = {answer for cloze in clozes(text.format("In the Castle"), "_") for answer in cloze.answers}
    assert found == {"Old Sarum Castle", "Castle"}


def test_every_occurrence_in_the_sentence_is_hidden_whatever_its_case() -> None:
    made = clozes("Ice melts. When ICE is pure, ice is clear.", "[MASK]")
    assert [(cloze.question, cloze.answers) for cloze in made] == [
        ("[MASK] melts.", ("ICE", "ice")),
        ("When [MASK] is pure, [MASK] is clear.", ("Ice",)),
    ]


@pytest.mark.parametrize("text", ["", "One sentence names a fox, and the fox again.", "It is what it is. What is it?", "!!! ... ???"])
def test_text_without_a_recurring_span_gives_no_question(text: str) -> None:
    assert clozes(text, "[MASK]") == []


def test_longest_spans_are_ten_words() -> None:
    long = "alpha beta gamma delta epsilon zeta theta iota kappa lambda sigma omega"
    answers = [answer for cloze in clozes(f"{long}. {long.capitalize()}.", "_") for answer in cloze.answers]
    assert answers
    assert max(len(answer.split()) for answer in answers) == 10


def configured(folder: Path, checkpoint: Path, **changes: object) -> RecurringSpansConfig:
    texts = folder / "texts.txt"
    towns = ["Stratford", "Evesham", "Pershore", "Warwick", "Rugby", "Bidford"]
    texts.write_text("\n".join(f"{town} lies on a river. A bridge at {town} was built in {1400 + n}." for n, town in enumerate(towns)))
    loop = LoopConfig(epochs=2, batch_examples=4, precision="fp32", threads=1)
    settings: dict[str, object] = {
        "train": str(texts),
        "checkpoint": str(checkpoint),
        "held_out": 2,
        "max_tokens": 128,
        "stride": 32,
        "lora_rank": 4,
        "loop": loop,
    }
    return RecurringSpansConfig(output=str(folder / "run"), **(settings | changes))  # type: ignore[arg-type]


def test_what_it_trains_is_a_readers_beginning(tiny_checkpoint: Path, tmp_path: Path) -> None:
    metrics = train(OBJECTIVES["recurring_spans"], configured(tmp_path, tiny_checkpoint), resume=False, console=quiet())
    assert set(metrics) == {"held_out_em", "held_out_f1", "score"}
    task = RecurringSpansTask(configured(tmp_path, tiny_checkpoint), quiet())
    begun = trained_reader(task.checkpoint, str(tmp_path / "run" / "best"))
    heads = {name: weight for name, weight in begun.named_parameters() if weight.requires_grad}
    assert any("qa_outputs" in name for name in heads)
    assert any("lora_B" in name and bool(weight.any()) for name, weight in heads.items())


def test_each_epoch_draws_anew_and_the_same_on_every_run(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = configured(tmp_path, tiny_checkpoint, questions_a_passage=1, no_answer_share=0.0)
    first, second = RecurringSpansTask(config, quiet()), RecurringSpansTask(config, quiet())

    def drawn(task: RecurringSpansTask, epoch: int) -> list[str]:
        return [example.question.text for batch in task.batches(epoch) for example in batch]

    assert len(drawn(first, 0)) == 4
    assert [drawn(first, epoch) for epoch in range(4)] == [drawn(second, epoch) for epoch in range(4)]
    assert len({text for epoch in range(8) for text in drawn(first, epoch)}) > 4
    asked = {question.context for question in first.held_out}
    assert not asked & {example.question.context for batch in first.batches(0) for example in batch}


def test_a_question_beside_a_foreign_passage_has_no_answer_there(tiny_checkpoint: Path, tmp_path: Path) -> None:
    task = RecurringSpansTask(configured(tmp_path, tiny_checkpoint, no_answer_share=1.0), quiet())
    foreign = [example for batch in task.batches(0) for example in batch if example.passages != [example.question.context]]
    assert foreign
    assert not any(occurrences(example.passages[0], example.question.answers) for example in foreign)


def test_a_passage_that_holds_the_answer_inside_a_longer_word_or_in_other_case_is_not_one_without_it(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    task = RecurringSpansTask(configured(tmp_path, tiny_checkpoint, no_answer_share=1.0), quiet())
    question = Question(id="0", text="[MASK] lies on a river.", context="A bridge at Warwick was built in 1403.", answers=("Warwick",))
    for text, read in [("Warwickshire is green.", question.context), ("In WARWICK.", question.context), ("Rugby.", "Rugby.")]:
        other = Question(id="1", text="?", context=text, answers=())
        assert task._example(question, [other], random.Random(0)).passages == [read]


def test_a_span_longer_than_an_answer_may_be_is_no_question(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match="within max_answer_tokens, 2"):  # no town has so few tokens
        RecurringSpansTask(configured(tmp_path, tiny_checkpoint, max_answer_tokens=2), quiet())


def test_a_held_out_share_that_leaves_no_passage_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match="recur in 6 passages, and held_out takes 6 of them"):
        RecurringSpansTask(configured(tmp_path, tiny_checkpoint, held_out=200), quiet())


def test_texts_in_which_nothing_recurs_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = configured(tmp_path, tiny_checkpoint)
    Path(config.train).write_text("Nothing here.\nNor here.\n")
    with pytest.raises(InvalidData, match="no span recurs in two sentences"):
        RecurringSpansTask(config, quiet())
