"""The index of a run: whose vectors it holds, when it is made anew, what it proposes, and that it refuses strangers."""

from __future__ import annotations

import io
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from openbook_training.checkpoint import resolve_checkpoint
from openbook_training.config import check
from openbook_training.embedding import TextEncoder
from openbook_training.errors import InvalidConfig, InvalidData
from openbook_training.heads import RowEncoder
from openbook_training.index_refresh import IndexConfig, IndexKeeper, overlap
from openbook_training.masked_language_model import build_masked_lm
from openbook_training.passage_index import PassageIndex, index_file, load_index, texts_digest, weights_digest
from openbook_training.realm import Realm
from openbook_training.retriever import build_retriever
from rich.console import Console

WORDS = "red blue green one two three city river king book".split()
TEXTS = [f"the {a} {b} of {c}" for a in WORDS[:3] for b in WORDS[3:6] for c in WORDS[6:]]


@pytest.fixture
def model(tiny_checkpoint: Path) -> Realm:
    checkpoint = resolve_checkpoint(str(tiny_checkpoint))
    encoder = RowEncoder(checkpoint, max_tokens=24)
    language_model = build_masked_lm(checkpoint, lora_rank=2, lora_alpha=2)
    return Realm(
        build_retriever(checkpoint, lora_rank=2, lora_alpha=2), language_model, encoder, pooling="mean", null_score=0.4, temperature=0.1
    )


@pytest.fixture
def keeper(tiny_checkpoint: Path, tmp_path: Path) -> Callable[..., IndexKeeper]:
    def build(folder: Path = tmp_path, **settings: Any) -> IndexKeeper:
        rows = TextEncoder(resolve_checkpoint(str(tiny_checkpoint))).rows([*TEXTS, *WORDS], 24)
        config = IndexConfig(**{"refresh": "full", "every_steps": 1000, "probe_steps": 1, "probe_passages": 12, **settings})
        console = Console(file=io.StringIO())
        passages = texts_digest(TEXTS)
        of = {"base": "base", "passages": passages, "precision": "fp32", "console": console}
        return IndexKeeper(config, folder, rows[: len(TEXTS)], rows[len(TEXTS) :], k=3, **of)

    return build


def move(model: Realm, by: float) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.retriever.parameters():
            if parameter.requires_grad:
                parameter += by * torch.randn_like(parameter)


def files(folder: Path) -> set[str]:
    return {file.name for file in folder.glob("index-*")}


def test_the_index_holds_the_vectors_of_the_retriever_and_names_its_weights(model: Realm, keeper: Callable[..., IndexKeeper]) -> None:
    kept = keeper()
    assert kept.begin(model)
    assert not kept.begin(model)
    assert kept.index.embedder == weights_digest("base/fp32", model.retriever)
    assert np.allclose(kept.index.vectors, kept.embed(model, kept._rows))
    before = kept.index
    move(model, 0.3)
    assert weights_digest("base/fp32", model.retriever) != before.embedder
    assert weights_digest("other/fp32", model.retriever) != weights_digest("base/fp32", model.retriever)


def test_a_later_start_finds_the_index_that_an_earlier_one_made(model: Realm, keeper: Callable[..., IndexKeeper]) -> None:
    first, second = keeper(), keeper()
    first.begin(model)
    second._made = lambda *arguments: pytest.fail("embedded again")  # type: ignore[assignment,method-assign]
    second.begin(model)
    assert np.array_equal(first.index.vectors, second.index.vectors)


@pytest.mark.parametrize("what", ["embedder", "passages", "torn", "missing"])
def test_vectors_of_another_embedder_or_of_other_passages_are_refused(
    model: Realm, keeper: Callable[..., IndexKeeper], tmp_path: Path, what: str
) -> None:
    kept = keeper()
    kept.begin(model)
    state, file = kept.state(), index_file(tmp_path, kept.index.embedder)
    message = f"vectors of the {what} .*; remove the file"
    if what == "embedder":
        move(model, 0.3)
        other = keeper(tmp_path / "other")
        (tmp_path / "other").mkdir()
        other.begin(model)
        shutil.copy(index_file(tmp_path / "other", other.index.embedder), file)
    elif what == "passages":
        PassageIndex(kept.index.vectors, kept.index.embedder, "0" * 64).save(tmp_path)
    elif what == "torn":
        file.write_bytes(file.read_bytes()[:-5])
        message = "cannot be read .* copy the whole run folder"
    else:
        file.unlink()
        message = "cannot be read .* copy the whole run folder"
    with pytest.raises(InvalidData, match=message):
        keeper().restore(state)


def test_a_schedule_makes_the_index_anew_and_keeps_what_the_last_checkpoint_names(
    model: Realm, keeper: Callable[..., IndexKeeper], tmp_path: Path
) -> None:
    kept = keeper(every_steps=2, probe_steps=0)
    kept.begin(model)
    made = [kept.index.embedder]
    saved = kept.state()
    for step in range(7):
        kept.before_step(model, step)
        if kept.index.embedder != made[-1]:
            assert step in {2, 4, 6}
            made.append(kept.index.embedder)
            assert np.allclose(kept.index.vectors, kept.embed(model, kept._rows))
        move(model, 0.05)
    assert len(set(made)) == 4
    assert files(tmp_path) == {index_file(tmp_path, name).name for name in (made[0], made[2], made[3])}
    again = keeper()
    again.restore(saved)  # as after a kill: the checkpoint's index is still there
    assert again.index.embedder == made[0]


@pytest.mark.parametrize(
    ("settings", "due"), [({"below_cosine": 0.999}, True), ({"below_overlap": 1.0}, True), ({"below_cosine": 0.01}, False)]
)
def test_measured_drift_makes_the_index_anew(
    model: Realm, keeper: Callable[..., IndexKeeper], settings: dict[str, float], due: bool
) -> None:
    kept = keeper(every_steps=0, **settings)
    kept.begin(model)
    first = kept.index
    kept.before_step(model, 1)
    assert kept.index is first
    assert kept.observed() == pytest.approx({"drift/probe_cosine": 100.0, "drift/probe_overlap": 100.0})
    assert kept.observed() == {}
    move(model, 0.3)
    kept.before_step(model, 2)
    drift = kept.observed()
    now = kept.embed(model, [kept._rows[row] for row in kept._probe])
    assert drift["drift/probe_cosine"] == pytest.approx(
        100 * np.mean([a @ b for a, b in zip(now, first.vectors[kept._probe], strict=True)]), rel=1e-5
    )
    assert drift["drift/probe_cosine"] < 99
    assert (kept.index is not first) == due


def test_overlap_is_the_share_of_the_best_that_both_find() -> None:
    rng = np.random.default_rng(0)
    queries, one, other = (rng.normal(size=(count, 5)).astype(np.float32) for count in (6, 20, 20))
    expected = 0.0
    for x in queries:
        best = [sorted(range(20), key=lambda row, of=of: -float(of[row] @ x))[:4] for of in (one, other)]  # type: ignore[misc]
        expected += len(set(best[0]) & set(best[1])) / 4 / 6
    assert overlap(queries, one, other, 4) == pytest.approx(expected)
    assert overlap(queries, one, one, 4) == 1.0


def test_a_search_gives_the_best_that_are_allowed(model: Realm) -> None:
    rng = np.random.default_rng(0)
    vectors, queries = rng.normal(size=(30, 5)).astype(np.float32), rng.normal(size=(4, 5)).astype(np.float32)
    seen = {(number, z) for number in range(4) for z in rng.choice(30, 6, replace=False)}
    found = PassageIndex(vectors, "", "").search(queries, 3, lambda number, z: (number, z) not in seen)
    for number, x in enumerate(queries):
        ranking = sorted(range(30), key=lambda z: -float(vectors[z] @ x))
        assert found[number] == [z for z in ranking if (number, z) not in seen][:3]


def test_reranking_reads_the_best_by_todays_vectors_of_what_the_old_index_proposes(
    model: Realm, keeper: Callable[..., IndexKeeper]
) -> None:
    kept = keeper(refresh="rerank", every_steps=0, proposed=8)
    kept.begin(model)
    move(model, 0.5)
    queries = kept.embed(model, kept._queries)
    now = kept.embed(model, kept._rows)
    proposed = kept.index.search(queries, 8, lambda number, z: True)
    found = kept.propose(model, queries, lambda number, z: True)
    assert found == [sorted(rows, key=lambda z: -float(now[z] @ x))[:3] for x, rows in zip(queries, proposed, strict=True)]
    assert found != [rows[:3] for rows in proposed]


def test_only_the_first_process_lets_an_index_go_for_it_alone_knows_the_one_that_a_checkpoint_names(
    model: Realm, keeper: Callable[..., IndexKeeper], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, other = keeper(every_steps=1, probe_steps=0), keeper(every_steps=1, probe_steps=0)
    first.begin(model)
    other.begin(model)
    named = first.state()
    for step in (1, 2, 3):
        move(model, 0.1)
        for kept, is_first in ((first, True), (other, False)):
            monkeypatch.setattr(
                "openbook_training.index_refresh.process", lambda is_first=is_first: SimpleNamespace(is_main_process=is_first)
            )
            kept.before_step(model, step)
    assert len(files(tmp_path)) == 3  # the checkpoint's, the last and the one before
    resumed = keeper()
    resumed.restore(named)
    assert resumed.index.embedder == named["embedder"]


def test_damaged_names_are_told(tmp_path: Path) -> None:
    name = f"{random.Random(0).getrandbits(256):064x}"
    with pytest.raises(InvalidData, match="cannot be read"):
        load_index(tmp_path, name, "")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"refresh": "weekly"}, "'weekly' is none of none, query_side, rerank, full"),
        ({"every_steps": 0}, "full needs every_steps"),
        ({"refresh": "none"}, "'none' never does: leave them 0"),
        ({"below_cosine": 1.5}, "below_cosine: 1.5"),
        ({"below_cosine": 0.9, "probe_steps": 0}, "probe_steps: 0"),
        ({"probe_passages": 0}, "probe_passages: 0"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        check(IndexConfig(**{"every_steps": 10} | settings))
