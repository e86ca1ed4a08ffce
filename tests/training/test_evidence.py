"""Evidence found for claims, against formulas written out: which passages, in which order, and how much of the chosen evidence is there."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import numpy as np
from openbook_training.beir import Passage
from openbook_training.checkpoint import resolve_checkpoint
from openbook_training.evidence import beside_retrieved, evidence_corpus, evidence_found
from openbook_training.labelled import Columns, Labelled, load_labelled
from openbook_training.negatives import embed
from rich.console import Console

WORDS = "red blue green one two three city river king book".split()


def quiet() -> Console:
    return Console(file=io.StringIO())


def claims(count: int, seed: int) -> list[Labelled]:
    """With one to three passages of evidence, some of which other claims have too."""
    rng, pool = random.Random(seed), [f"the {a} {b}" for a in WORDS[:5] for b in WORDS[5:]]
    return [
        Labelled(place=str(n), text=" ".join(rng.choices(WORDS, k=4)), label="yes", passages=tuple(rng.sample(pool, rng.randint(1, 3))))
        for n in range(count)
    ]


def test_a_claim_is_read_beside_the_nearest_passages_best_first(tiny_checkpoint: Path) -> None:
    checkpoint = resolve_checkpoint(str(tiny_checkpoint))
    rows = claims(12, 1)
    corpus = evidence_corpus("", rows, quiet())
    assert [passage.text for passage in corpus] == list(dict.fromkeys(text for row in rows for text in row.passages))
    everything = sorted({one.text for one in (*rows, *corpus)})
    vectors = dict(zip(everything, embed(checkpoint, everything).astype(float), strict=True))
    for count in (1, 4, 99):  # there are fewer than 99
        for row, retrieved in zip(
            rows, beside_retrieved(rows, corpus, count, checkpoint, lambda texts: embed(checkpoint, texts)), strict=True
        ):
            best = sorted(corpus, key=lambda passage: -float(vectors[passage.text] @ vectors[row.text]))[:count]
            assert retrieved.passages == tuple(passage.text for passage in best)
            assert retrieved.evidence == " ".join(passage.text for passage in best)
            assert (retrieved.place, retrieved.text, retrieved.label) == (row.place, row.text, row.label)


def test_titles_help_to_find_passages_and_are_not_read(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    documents = [{"_id": "a", "title": "Red king", "text": "it was"}, {"_id": "b", "text": "a river"}]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, documents)))
    corpus = evidence_corpus(str(folder), [], quiet())
    assert corpus == [Passage(id="a", text="it was", title="Red king"), Passage(id="b", text="a river")]
    embedded: list[str] = []

    def vectors(texts: list[str]) -> np.ndarray:
        embedded.extend(texts)
        return np.array([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]], np.float32)

    row = Labelled(place="1", text="the king", label="yes")
    [found] = beside_retrieved([row], corpus, 2, resolve_checkpoint(str(tiny_checkpoint)), vectors)
    assert embedded == ["Red king\nit was", "a river", "the king"]
    assert found.passages == ("it was", "a river")
    (tmp_path / "texts.txt").write_text("one\n\ntwo\none\n")
    assert [passage.text for passage in evidence_corpus(str(tmp_path / "texts.txt"), [row], quiet())] == ["one", "two"]


def test_how_often_evidence_is_found_is_counted_claim_by_claim() -> None:
    rng, rows = random.Random(3), claims(40, 2)
    pool = sorted({text for row in rows for text in row.passages})
    retrieved = []
    for row in rows:
        passages = rng.sample(pool, 8)
        passages[0] = f"so it was {passages[0]} ."  # a sentence within a paragraph
        retrieved.append(Labelled(place=row.place, text=row.text, label=row.label, passages=tuple(passages)))
    found = evidence_found(rows, retrieved, 8)
    assert list(found) == ["all@8", "any@8"]
    for number, (row, beside) in enumerate(zip(rows, retrieved, strict=True)):
        inside = sum(1 for wanted in row.passages if wanted in " | ".join(beside.passages))
        assert found["all@8"][number] == (inside == len(row.passages))
        assert found["any@8"][number] == (inside >= 1)
    assert 0 < found["all@8"].mean() < found["any@8"].mean() < 1


def test_evidence_is_a_text_or_a_list_of_passages_without_blank_ones(tmp_path: Path) -> None:
    file = tmp_path / "claims.jsonl"
    given: list[object] = ["one text", [" a ", "", "b"], [], ["a", 3], "  ", None]
    file.write_text("\n".join(json.dumps({"claim": "c", "label": "yes", "evidence": one}) for one in given))
    rows, problems = load_labelled(str(file), Columns(text="claim", label="label", evidence="evidence"))
    assert [(row.passages, row.evidence) for row in rows] == [(("one text",), "one text"), (("a", "b"), "a b")]
    assert [problem.split(": ", 1)[1] for problem in problems] == [
        "line 3: 'evidence' is empty",
        "line 4: 'evidence' is ['a', 3], no text",
        "line 5: 'evidence' is empty",
        "line 6: 'evidence' is empty",
    ]
