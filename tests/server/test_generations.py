"""Generations in a folder: built from what is stored, published in one step, taken back, removed; with kills and writes meanwhile."""

from __future__ import annotations

import json
import os
import random
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from openbook import cli
from openbook_server import command_index
from openbook_server.bundle import load_bundle
from openbook_server.errors import InvalidRequest, KnowledgeBaseDamaged, PassageTooLong
from openbook_server.ingest.embed import PassageEncoder
from openbook_server.knowledge import Document, Passage, PassageVectors, SearchOptions, embedded, inventory, pack
from openbook_server.knowledge.building import build_generation
from openbook_server.knowledge.embedded import EmbeddedKnowledgeBase
from openbook_server.knowledge.generations import Generation, Generations
from openbook_server.knowledge.home import Home, Resident
from openbook_server.knowledge.inventory import describe_generations, remove_generation
from openbook_server.knowledge.records import BundlePlace
from openbook_server.knowledge.store import FILE, Store
from openbook_server.tokenization import load_tokenizer

OLD, NEW = "a" * 64, "b" * 64
DIM = {OLD: 16, NEW: 24}


def vector(fingerprint: str, text: str) -> np.ndarray:
    """What an embedder makes of a text: the same for the same text, and of other dimensions for another embedder."""
    row = np.random.default_rng([*text.encode(), DIM[fingerprint]]).normal(size=DIM[fingerprint]).astype(np.float32)
    return np.asarray(row / np.linalg.norm(row))


class Embed:
    """An embedder of passages that counts them."""

    def __init__(self, fingerprint: str) -> None:
        self.fingerprint, self.passages = fingerprint, 0

    def __call__(self, passages: Sequence[Passage]) -> PassageVectors:
        self.passages += len(passages)
        rows = np.array([vector(self.fingerprint, passage.text) for passage in passages])
        return PassageVectors(rows, [pack(row[None]) for row in rows])


def opened(folder: Path, fingerprint: str, *, flat_limit: int = 20, **options: object) -> EmbeddedKnowledgeBase:
    return EmbeddedKnowledgeBase(
        folder,
        fingerprint=fingerprint,
        dim=DIM[fingerprint],
        create=True,
        flat_limit=flat_limit,
        **options,  # type: ignore[arg-type]
    )


def store(knowledge_base: EmbeddedKnowledgeBase, fingerprint: str, ids: Sequence[str], version: str = "") -> None:
    documents = [(Document(id=id_, text=f"w{id_}{version}"), "d" + version) for id_ in ids]
    passages = [Passage(id=f"{document.id}#0", document_id=document.id, text=document.text, start=0) for document, _ in documents]
    knowledge_base.replace_documents(documents, passages, *Embed(fingerprint)(passages))


def build(knowledge_base: EmbeddedKnowledgeBase, fingerprint: str) -> int:
    """Returns how many passages it took to embed."""
    embed = Embed(fingerprint)
    assert build_generation(knowledge_base, embed)
    return embed.passages


def hits(
    knowledge_base: EmbeddedKnowledgeBase, fingerprint: str, texts: Sequence[str], mode: str = "dense"
) -> list[list[tuple[str, float]]]:
    queries = np.array([vector(fingerprint, text) for text in texts])
    found = knowledge_base.search(texts, queries, SearchOptions(top_k=5, mode=mode, ef=1_000))  # type: ignore[arg-type]
    return [[(hit.passage.id, round(hit.score, 5)) for hit in row] for row in found]


def states(folder: Path) -> list[tuple[str, int, int]]:
    """(state, passages, lacking) of each generation, by number."""
    known = Store(folder, read_only=True)
    try:
        return [(state.state, state.passages, state.lacking) for state in describe_generations(folder, known)]
    finally:
        known.close()


IDS = [f"d{number}" for number in range(60)]
TEXTS = ["wd1", "wd30", "wd59", "something else"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A knowledge base of the old embedder with a snapshot."""
    knowledge_base = opened(tmp_path / "kb", OLD)
    store(knowledge_base, OLD, IDS)
    knowledge_base.snapshot()
    knowledge_base.close()
    return tmp_path / "kb"


def test_each_generation_keeps_its_snapshot_and_takes_it_along_when_it_is_removed(folder: Path) -> None:
    following = opened(folder, NEW, new_generation=True)
    build(following, NEW)
    following.snapshot()
    following.publish()
    following.close()
    known = Store(folder)
    kept, live = (generation.name for generation in known.generations.all())
    assert {file.name.rpartition("-")[0] for file in folder.glob("index-*.hnsw")} == {f"index-{kept}", f"index-{live}"}
    for name, problem in (("5-x", "none of"), (live, "is live")):
        with pytest.raises(InvalidRequest, match=rf"^name: .*{problem}"):
            remove_generation(folder, known, name)
    remove_generation(folder, known, kept)
    known.close()
    assert states(folder) == [("live", 60, 0)]
    assert {file.name.rpartition("-")[0] for file in folder.glob("index-*.hnsw")} == {f"index-{live}"}
    again = opened(folder, NEW)
    assert hits(again, NEW, TEXTS)[0][0] == ("d1#0", 1.0)
    again.close()


def test_a_generation_is_described_as_it_was_at_one_moment_whatever_is_written_and_replaced_meanwhile(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    knowledge_base = opened(folder, OLD)
    really_count = Generations.count
    [snapshot] = folder.glob("index-*.hnsw")

    def count(self: Generations, generation: Generation) -> int:
        writer = threading.Thread(target=store, args=(knowledge_base, OLD, ["meanwhile"]))
        writer.start()
        writer.join()
        return really_count(self, generation)

    monkeypatch.setattr(Generations, "count", count)
    monkeypatch.setattr(inventory, "_snapshots", lambda *_: [snapshot, folder / "index-gone"])
    [state] = knowledge_base.generation_states()
    assert (state.passages, state.lacking, state.snapshot_bytes) == (60, 0, snapshot.stat().st_size)
    assert knowledge_base.counts().passages == 61
    knowledge_base.close()


def test_a_generation_that_is_removed_while_all_are_described_is_described_as_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    knowledge_base = opened(folder, OLD)
    following = opened(folder, NEW, new_generation=True, beside=knowledge_base)
    build(following, NEW)
    following.close()
    remover = threading.Thread(target=knowledge_base.remove_generation, args=(following.generation,))
    really_measure = Generations.bytes_a_passage

    def measure(self: Generations, generation: Generation) -> float:
        if not remover.ident:
            remover.start()
            remover.join()
        return really_measure(self, generation)

    monkeypatch.setattr(Generations, "bytes_a_passage", measure)
    assert [(state.name, state.passages) for state in knowledge_base.generation_states()][1:] == [(following.generation, 60)]
    assert len(knowledge_base.generation_states()) == 1
    knowledge_base.close()


def test_where_the_store_alone_is_restored_no_generation_finds_what_was_lost_under_numbers_given_again(folder: Path) -> None:
    answering = opened(folder, OLD)
    following = opened(folder, NEW, new_generation=True, beside=answering)
    build(following, NEW)
    following.close()
    answering.close()
    backup = (folder / FILE).read_bytes()
    answering = opened(folder, OLD)
    following = opened(folder, NEW, new_generation=True, beside=answering)
    store(answering, OLD, [f"lost{number}" for number in range(30)])
    build(following, NEW)
    answering.snapshot()
    following.snapshot()
    following.close()
    answering.close()
    (folder / FILE).write_bytes(backup)
    answering = opened(folder, OLD)
    for number in range(30):  # until the store is further than it was
        store(answering, OLD, [f"fresh{number}"])
    answering.close()  # without a snapshot, as after a crash
    answering = opened(folder, OLD)
    following = opened(folder, NEW, new_generation=True, beside=answering)
    build(following, NEW)
    for knowledge_base, fingerprint in ((answering, OLD), (following, NEW)):
        assert [row[0] for row in hits(knowledge_base, fingerprint, ["wfresh0", "wfresh29"])] == [("fresh0#0", 1.0), ("fresh29#0", 1.0)]
    following.close()
    answering.close()


def test_the_disk_gets_back_what_a_removed_generation_took(folder: Path) -> None:
    knowledge_base = opened(folder, OLD, flat_limit=5_000)
    store(knowledge_base, OLD, [f"e{number}" for number in range(3_000)])
    knowledge_base.close()
    alone = (folder / FILE).stat().st_size
    following = opened(folder, NEW, new_generation=True, flat_limit=5_000)
    build(following, NEW)
    kept = following.generation
    following.close()
    both = (folder / FILE).stat().st_size
    assert both > alone + 3_000 * 4 * DIM[NEW]
    known = Store(folder)
    remove_generation(folder, known, kept)
    known.close()
    assert (folder / FILE).stat().st_size < alone + (both - alone) / 4


def test_a_generation_that_lacks_nothing_looks_only_at_what_was_stored_since(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live = opened(folder, OLD)
    following = live.open_beside(fingerprint=OLD, dim=DIM[OLD], bundle=BundlePlace("other", "/other"), graph_dims=8)
    looks, lacking = [], following._store.generations.lacking

    def watched(generation: Generation, *, after: int, limit: int) -> list[int]:
        looks.append(after)
        return lacking(generation, after=after, limit=limit)

    monkeypatch.setattr(following._store.generations, "lacking", watched)
    for last in (60, 61):
        assert following.lacking(10) is None
        assert following.lacking(10) is None
        assert looks[-1] == last
        store(live, OLD, [f"e{last}"])
    following.close()
    live.close()


def test_generations_of_one_embedder_share_its_vectors(folder: Path) -> None:
    other = opened(folder, OLD, new_generation=True, graph_dims=8)
    assert (build(other, OLD), other.graph_width) == (0, 8)
    other.publish()
    live = hits(other, OLD, TEXTS)
    other.close()
    known = Store(folder)
    remove_generation(folder, known, known.generations.all()[0].name)  # and its vectors are still needed, those of windows too
    known.close()
    with sqlite3.connect(folder / FILE) as connection:
        [table] = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE name GLOB 'windows_*'")]
        assert connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (60,)  # noqa: S608
    connection.close()
    assert states(folder) == [("live", 60, 0)]
    again = opened(folder, OLD)
    assert (again.graph_width, hits(again, OLD, TEXTS)) == (8, live)
    again.close()


@pytest.mark.parametrize("flat_limit", [20, 1_000])
def test_what_is_written_while_a_generation_of_the_same_embedder_is_open_is_found_by_it_and_on_the_way_back(
    folder: Path, flat_limit: int
) -> None:
    def beside(knowledge_base: EmbeddedKnowledgeBase, name: str) -> EmbeddedKnowledgeBase:
        place = BundlePlace(name, f"/{name}")
        return EmbeddedKnowledgeBase(
            folder, fingerprint=OLD, dim=DIM[OLD], bundle=place, new_generation=True, beside=knowledge_base, flat_limit=flat_limit
        )

    first = opened(folder, OLD, bundle=BundlePlace("first", "/first"))
    second = beside(first, "second")
    store(first, OLD, ["d1", "new"], version="x")
    assert second.lacking(10) is None
    second.publish()
    for mode in ("dense", "hybrid", "lexical"):
        assert [row[0][0] for row in hits(second, OLD, ["wnewx", "wd1x"], mode)] == ["new#0", "d1#0"]
    first.close()
    back = beside(second, "first")
    store(second, OLD, ["newer"])
    assert second.delete_documents(["new"]) == 1
    back.publish()
    for knowledge_base in (back, second):
        assert knowledge_base._index.labels == knowledge_base._store.numbers()
        assert [hit for hit, _ in hits(knowledge_base, OLD, ["wnewer"])[0]].count("newer#0") == 1
        knowledge_base.close()


def test_a_generation_that_is_being_opened_holds_in_the_end_what_was_written_meanwhile(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = opened(folder, OLD)

    def write(ids: list[str]) -> None:
        store(live, OLD, ids)
        live.delete_documents(ids[:1])

    def load(*arguments: object, **options: object) -> None:  # the rows that are stored were looked up by now
        write(["d1", "e1", "e2"])

    def numbers(generation: Generation) -> frozenset[int]:  # they are not yet
        write(["d2", "e3", "e4"])
        return known(generation)

    known = live._store.generations.numbers
    monkeypatch.setattr(embedded, "load_snapshot", load)
    monkeypatch.setattr(Generations, "numbers", lambda self, generation: numbers(generation))
    following = live.open_beside(fingerprint=OLD, dim=DIM[OLD], bundle=BundlePlace("other", "/other"))
    assert following._index.labels == live._index.labels == live._store.numbers()
    assert [hit for hit, _ in hits(following, OLD, ["we2"])[0]].count("e2#0") == 1
    following.close()
    live.close()


def test_a_folder_from_before_generations_is_brought_to_the_new_format(folder: Path) -> None:
    before = opened(folder, OLD)
    expected, generation = [hits(before, OLD, TEXTS, mode) for mode in ("dense", "lexical")], before.generation
    before.close()
    [snapshot] = folder.glob("index-*.hnsw")
    with sqlite3.connect(folder / FILE) as connection:  # as format 1 was
        [table] = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE name GLOB 'vectors_????????????????'")]
        connection.execute("ALTER TABLE passages DROP COLUMN tokens")
        connection.execute("ALTER TABLE passages ADD COLUMN vector BLOB")
        connection.execute(f"UPDATE passages SET vector = (SELECT vector FROM {table} WHERE passage = number)")  # noqa: S608
        connection.execute(f"DROP TABLE {table}")
        connection.execute(f"DROP TABLE {table.replace('vectors', 'windows')}")
        connection.execute("DROP TABLE generations")
        connection.execute("CREATE VIRTUAL TABLE words USING fts5(title, text, content='passages', content_rowid='number')")
        connection.executemany(
            "INSERT INTO meta VALUES (?, ?)", {"fingerprint": OLD, "dim": "16", "graph_dims": "0", "generation": generation}.items()
        )
        connection.execute("UPDATE meta SET value = '1' WHERE key = 'format'")
    connection.close()
    with pytest.raises(KnowledgeBaseDamaged, match="openbook serve"):
        Store(folder, read_only=True)
    again = opened(folder, OLD)
    assert ([hits(again, OLD, TEXTS, mode) for mode in ("dense", "lexical")], again.generation) == (expected, generation)
    assert again._saved == again.sequence  # the snapshot is still good
    assert snapshot.is_file()
    again.close()
    with sqlite3.connect(folder / FILE) as connection:
        assert not connection.execute("SELECT 1 FROM sqlite_master WHERE name GLOB 'words*'").fetchall()
        assert connection.execute(f"SELECT count(*) FROM {table.replace('vectors', 'windows')}").fetchone() == (0,)  # noqa: S608
    connection.close()
    assert states(folder) == [("live", 60, 0)]


@pytest.mark.parametrize("version", [2, 3])
def test_a_folder_from_before_tokens_or_windows_is_brought_to_the_new_format_and_keeps_them_from_then_on(
    folder: Path, version: int
) -> None:
    before = opened(folder, OLD)
    expected = [hits(before, OLD, TEXTS, mode) for mode in ("dense", "lexical")]
    before.close()
    with sqlite3.connect(folder / FILE) as connection:  # as that format was
        [table] = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE name GLOB 'windows_*'")]
        connection.execute(f"DROP TABLE {table}")
        if version < 3:
            connection.execute("ALTER TABLE passages DROP COLUMN tokens")
        connection.execute("UPDATE meta SET value = ? WHERE key = 'format'", (str(version),))
    connection.close()
    with pytest.raises(KnowledgeBaseDamaged, match="openbook serve"):
        Store(folder, read_only=True)
    again = opened(folder, OLD)
    assert [hits(again, OLD, TEXTS, mode) for mode in ("dense", "lexical")] == expected
    assert all(hits(again, OLD, TEXTS, "hybrid"))
    document = Document(id="new", text="a zebra")
    passage = Passage(id="new#0", document_id="new", text="a zebra", start=0, tokens=b"its tokens")
    again.replace_documents([(document, "digest")], [passage], *Embed(OLD)([passage]))
    with sqlite3.connect(folder / FILE) as connection:
        assert connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (1,)  # noqa: S608
    connection.close()
    found = again.documents(["new", "d0"])
    assert [[passage.tokens for passage in found[id_]] for id_ in ("new", "d0")] == [[b"its tokens"], [b""]]
    again.close()


def work(folder: Path, number: int, out: int) -> None:
    """Build the generation of whichever embedder is not live beside the live one, while writing; publish it; begin again. Each thing
    that is done is told as a line."""
    while True:
        known = Store(folder, read_only=True)
        live = known.generations.live()
        known.close()
        assert live is not None
        one, other = live.fingerprint, NEW if live.fingerprint == OLD else OLD
        answering = opened(folder, one)
        following = opened(folder, other, new_generation=True, beside=answering)
        turns = 0
        while gap := following.lacking(9):
            gap.fill(*Embed(other)(gap.passages))
            turns += 1
            if turns % 3 == 0:
                store(answering, one, [f"n{number}"])
                os.write(out, f"stored n{number}\n".encode())
                number += 1
            else:
                os.write(out, b"filled\n")
        following.snapshot()
        following.publish()
        os.write(out, f"published {other}\n".encode())
        answering.close()
        following.close()


# For each number on its input: forks a process that does `work`, tells its id, and waits for its end.
FORKS = """
import importlib.util, os, pathlib, sys
sys.path[:0] = {path!r}
spec = importlib.util.spec_from_file_location("generations", {file!r})
module = importlib.util.module_from_spec(spec)
sys.modules["generations"] = module
spec.loader.exec_module(module)
for line in sys.stdin:
    read, out = os.pipe()
    child = os.fork()
    if not child:
        module.work(pathlib.Path({folder!r}), int(line), out)
    os.close(out)
    print(child, read, flush=True)
    os.waitpid(child, 0)
    os.close(read)
    print("dead", flush=True)
"""


def kill_loop(folder: Path, kills: int) -> None:
    """Kill the process at random points of building and publishing; after each the store is whole, and either the generation before
    or the new one is live, complete."""
    rng = random.Random(kills)
    stored: list[str] = []
    published = OLD
    script = FORKS.format(path=sys.path, file=__file__, folder=str(folder))
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as forks:
        assert forks.stdin is not None
        assert forks.stdout is not None
        for _ in range(kills):
            print(int(stored[-1][1:]) + 1 if stored else 0, file=forks.stdin, flush=True)
            child, pipe = map(int, forks.stdout.readline().split())
            with open(f"/proc/{forks.pid}/fd/{pipe}", "rb", buffering=0) as told:
                data, wanted = b"", rng.randrange(1, 20)
                while data.count(b"\n") < wanted:
                    data += told.read(64)
                os.kill(child, 9)
                while more := told.read(4_096):
                    data += more
            assert forks.stdout.readline() == "dead\n"
            for line in data.decode().splitlines():
                what, _, rest = line.partition(" ")
                stored += [rest] if what == "stored" else []
                published = rest if what == "published" else published
            known = Store(folder, read_only=True)
            live = known.generations.live()
            known.close()
            assert live is not None
            assert live.fingerprint == published or data.endswith(b"filled\n") or data.endswith(b"stored " + stored[-1].encode() + b"\n")
            published = live.fingerprint
            answering = opened(folder, published)
            assert {state for state in states(folder) if state[0] == "live"} == {("live", answering.counts().passages, 0)}
            [everything] = answering.search([""], vector(published, "x")[None], SearchOptions(top_k=100_000, mode="dense"))
            assert {*IDS, *stored} <= {hit.passage.document_id for hit in everything}
            assert len(everything) == answering.counts().passages
            answering.close()
        forks.stdin.close()
    assert len(states(folder)) == 2  # what was begun was gone on with, never begun again


def test_a_kill_at_any_point_leaves_the_generation_before_or_the_new_one_and_building_goes_on(folder: Path) -> None:
    kill_loop(folder, 12)


@pytest.mark.slow
def test_five_hundred_kills_of_building_and_publishing(folder: Path) -> None:
    kill_loop(folder, 500)


@pytest.mark.parametrize("graph_dims", [None, 8])
def test_the_command_builds_and_publishes_and_says_what_is_wrong(
    tiny_bundle: Path,
    tuned_bundle: Path,
    tiny_knowledge_base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    graph_dims: int | None,
) -> None:
    more = ["--graph-dims", str(graph_dims)] if graph_dims is not None else []
    assert cli.main(["index", str(tuned_bundle), str(tiny_knowledge_base)]) == 1
    assert "none given" in capsys.readouterr().err
    assert cli.main(["index", str(tuned_bundle), str(tiny_knowledge_base), "--new-generation", *more]) == 0
    assert "generation 2-" in capsys.readouterr().out
    assert cli.main(["info", str(tiny_knowledge_base), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len([key for key in told if key.startswith("generation ")]) == 2
    assert told["generation"].startswith("2-")
    assert str(tuned_bundle) in told[f"generation {told['generation']}"]
    (tmp_path / "more.txt").write_text("a king was by the river")
    assert cli.main(["index", str(tuned_bundle), str(tiny_knowledge_base), str(tmp_path / "more.txt"), "--new-generation", *more]) == 0
    assert states(tiny_knowledge_base) == [("kept", 3, 1), ("live", 4, 0)]
    assert cli.main(["index", str(tiny_bundle), str(tiny_knowledge_base), "--new-generation"]) == 0
    assert states(tiny_knowledge_base)[0] == ("live", 4, 0)


def test_a_build_that_is_stopped_stores_no_sources_and_the_same_command_goes_on(
    tuned_bundle: Path, tiny_knowledge_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def stopped_at_once() -> Iterator[Callable[[], bool]]:
        yield lambda: True

    (tmp_path / "more.txt").write_text("a king was by the river")
    command = ["index", str(tuned_bundle), str(tiny_knowledge_base), str(tmp_path / "more.txt"), "--new-generation"]
    with monkeypatch.context() as patched:
        patched.setattr(command_index, "_stop_on_signal", stopped_at_once)
        assert cli.main(command) == command_index.STOPPED
    assert "stopped; the same command goes on" in capsys.readouterr().err
    assert [state for state, *_ in states(tiny_knowledge_base)] == ["live", "new"]
    assert cli.main(command) == 0
    assert states(tiny_knowledge_base) == [("kept", 3, 1), ("live", 4, 0)]


def test_passages_that_another_bundle_cannot_read_whole_are_refused_before_anything_is_made(
    tuned_bundle: Path, tiny_knowledge_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with sqlite3.connect(tiny_knowledge_base / FILE) as connection:
        connection.execute("INSERT OR REPLACE INTO meta VALUES ('passage_tokens', '300')")
    connection.close()
    assert cli.main(["index", str(tuned_bundle), str(tiny_knowledge_base), "--new-generation"]) == 1
    assert "split again" in capsys.readouterr().err
    assert len(states(tiny_knowledge_base)) == 1


def test_a_single_passage_that_is_too_long_for_another_tokenizer_is_refused_by_name(tiny_bundle: Path) -> None:
    tokenizer = load_tokenizer(load_bundle(tiny_bundle).tokenizer_path)
    passage = Passage(id="x#7", document_id="x", text="red " * 30, start=0)
    assert len(PassageEncoder(tokenizer, 20)([passage])[0].ids) == 20
    with pytest.raises(PassageTooLong, match=r"x#7.*32 tokens"):
        PassageEncoder(tokenizer, 20, whole=True)([passage])


class Noticed:
    """A lock that tells when somebody waits for it."""

    def __init__(self, waited_for: threading.Event) -> None:
        self._lock, self._waited_for = threading.Lock(), waited_for

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self._waited_for.set()
            self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()


class Interrupted(list[Resident]):
    """When it was gone through, something else is done."""

    def __init__(self, residents: Iterable[Resident], then: Callable[[], None]) -> None:
        super().__init__(residents)
        self._then = then

    def __iter__(self) -> Iterator[Resident]:
        yield from super().__iter__()
        self._then()


def test_an_index_that_opens_while_another_closes_hears_of_changes(tmp_path: Path) -> None:
    home = Home(tmp_path)
    _, leaves = home.enter(), home.enter()
    went_on, entered = threading.Event(), list[Resident]()

    def enter() -> None:
        entered.append(home.enter())
        went_on.set()

    entering = threading.Thread(target=enter)

    def begin() -> None:
        if not entering.ident:
            entering.start()
            assert went_on.wait(30)

    home._coming_and_going = Noticed(went_on)  # type: ignore[assignment]
    home._residents = Interrupted(home._residents, begin)  # type: ignore[assignment]
    home.leave(leaves)
    entering.join()
    assert entered[0] in home._residents
    assert leaves not in home._residents
    home.close()
