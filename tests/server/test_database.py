"""Threads that read one file at once: none waits for another's Python, and each sees what was acknowledged."""

from __future__ import annotations

import os
import resource
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from openbook_server.errors import KnowledgeBaseDamaged, KnowledgeBaseUnavailable, NotServing, OpenBookError
from openbook_server.knowledge import Document, Passage, SearchOptions, filters
from openbook_server.knowledge.database import Database
from openbook_server.knowledge.embedded import EmbeddedKnowledgeBase

WAIT = 120  # seconds, on a busy machine


def test_a_read_under_way_in_another_thread_hides_no_write(tmp_path: Path) -> None:
    database = Database(tmp_path / "a.sqlite")
    with database.transaction(counted=False) as connection:
        connection.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value)")
    database.record({"one": "1", "two": "2"})
    began, done = threading.Event(), threading.Event()

    def read_slowly() -> None:
        with database.read() as connection:
            rows = connection.execute("SELECT * FROM meta")
            rows.fetchone()
            began.set()
            done.wait(WAIT)
            rows.fetchall()

    reader = threading.Thread(target=read_slowly)
    reader.start()
    assert began.wait(WAIT)
    database.record({"one": "changed"})
    assert database.meta("one") == "changed"
    done.set()
    reader.join()
    database.close()


def test_closing_waits_for_a_read_under_way_and_refuses_what_comes_then(tmp_path: Path) -> None:
    database = Database(tmp_path / "a.sqlite")
    began, read = threading.Event(), list[tuple[int]]()

    def look_until_it_is_closed() -> None:
        while True:
            database.sequence()

    def read_while_it_is_closed() -> None:
        with database.read() as connection:
            began.set()
            with pytest.raises(OpenBookError):
                look_until_it_is_closed()
            read.extend(connection.execute("SELECT 7"))

    reader = threading.Thread(target=read_while_it_is_closed)
    reader.start()
    assert began.wait(WAIT)
    database.close()
    reader.join(WAIT)
    assert read == [(7,)]
    with pytest.raises(NotServing, match=r"a\.sqlite was closed"), database.transaction():
        pass


def test_within_a_standstill_a_thread_sees_no_write_of_another(tmp_path: Path) -> None:
    database = Database(tmp_path / "a.sqlite")
    with database.transaction(counted=False) as connection:
        connection.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value)")
    database.record({"one": "1"})
    with database.standstill():
        assert database.meta("one") == "1"
        writer = threading.Thread(target=database.record, args=({"one": "2"},))
        writer.start()
        writer.join()
        assert database.meta("one") == "1"
    assert database.meta("one") == "2"
    database.close()


def held(path: Path) -> Database:
    database = Database(path)
    with database.transaction(counted=False) as connection:
        connection.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value)")
    database.record({"one": "1"})
    return database


def test_a_thread_reads_for_the_first_time_whatever_another_is_writing(tmp_path: Path) -> None:
    database = held(tmp_path / "a.sqlite")
    with database.transaction() as connection, ThreadPoolExecutor() as threads:
        connection.execute("UPDATE meta SET value = '2'")
        assert threads.submit(database.meta, "one").result() == "1"
    database.close()


def test_a_new_file_gives_back_what_is_dropped_and_opening_it_again_writes_nothing(tmp_path: Path) -> None:
    held(tmp_path / "a.sqlite").close()
    before = (tmp_path / "a.sqlite").read_bytes()
    database = Database(tmp_path / "a.sqlite")
    assert database._writer.execute("PRAGMA auto_vacuum").fetchone() == (2,)
    assert database.meta("one") == "1"
    database.close()
    assert (tmp_path / "a.sqlite").read_bytes() == before


def test_a_file_that_another_process_has_locked_is_to_be_asked_again(tmp_path: Path) -> None:
    database = held(tmp_path / "a.sqlite")
    database._writer.execute("PRAGMA busy_timeout=1")
    other = sqlite3.connect(tmp_path / "a.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(KnowledgeBaseUnavailable, match=r"a\.sqlite: another process has it locked.*try again"):
        database.record({"one": "2"})
    other.execute("ROLLBACK")
    database.record({"one": "2"})
    other.close()
    database.close()


def test_a_full_disk_is_named_as_one_and_read_from(tmp_path: Path) -> None:
    database = held(tmp_path / "a.sqlite")
    database._writer.execute("PRAGMA max_page_count=4")
    with pytest.raises(KnowledgeBaseDamaged, match=r"a\.sqlite: the disk is full; nothing of this write is stored; make room"):
        database.record({"one": "x" * 100_000})
    with ThreadPoolExecutor() as threads:
        assert threads.submit(database.meta, "one").result() == "1"
    database.close()


def test_a_process_with_too_many_files_open_is_told_so_and_reads_again_when_it_has_fewer(tmp_path: Path) -> None:
    database = held(tmp_path / "a.sqlite")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ThreadPoolExecutor(1) as threads:
        free = os.dup(0)  # the lowest there is
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        try:
            with pytest.raises(KnowledgeBaseUnavailable, match=r"a\.sqlite: too many files are open .* \(ulimit -n\)"):
                threads.submit(database.meta, "one").result()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert threads.submit(database.meta, "one").result() == "1"
    database.close()


def test_a_thread_that_reads_for_the_first_time_does_not_read_another_file_that_took_the_place(tmp_path: Path) -> None:
    database = held(tmp_path / "a.sqlite")
    held(tmp_path / "b.sqlite").close()
    (tmp_path / "b.sqlite").rename(tmp_path / "a.sqlite")
    with ThreadPoolExecutor() as threads, pytest.raises(KnowledgeBaseDamaged, match="replaced while it is open"):
        threads.submit(database.meta, "one").result()
    database.close()


def scan_beside_looks(folder: str) -> None:
    """In a process of its own: where threads wait for each other's locks, no thread of it ever runs again."""
    knowledge_base = EmbeddedKnowledgeBase(Path(folder), fingerprint="f" * 64, dim=4, create=True)
    documents = [Document(id=f"d{n}", text="word", metadata={"year": str(n)}) for n in range(2_000)]
    passages = [Passage(id=f"{document.id}#0", document_id=document.id, text="word", start=0) for document in documents]
    knowledge_base.replace_documents([(one, "1") for one in documents], passages, np.tile(np.float32([1, 0, 0, 0]), (len(documents), 1)))
    searching = threading.Event()

    def search() -> None:
        for low in range(20):  # each another condition, so that none is remembered
            searching.set()
            options = SearchOptions(top_k=1, mode="lexical", condition=filters.Range("year", low))
            assert len(knowledge_base.search(["word"], None, options)[0]) == 1

    thread = threading.Thread(target=search)
    thread.start()
    searching.wait()
    while thread.is_alive():
        assert knowledge_base.live_generation == knowledge_base.generation
    thread.join()
    knowledge_base.close()


def test_a_search_by_range_and_other_reads_do_not_stop_each_other(tmp_path: Path) -> None:
    try:
        subprocess.run([sys.executable, __file__, str(tmp_path / "kb")], timeout=WAIT, check=True)
    except subprocess.TimeoutExpired:
        pytest.fail("the process stands still")


if __name__ == "__main__":
    scan_beside_looks(sys.argv[1])


@pytest.mark.parametrize("name", ["kb#1", "kb?mode=rwc", "kb%41", "k b"])
def test_a_folder_of_any_name_is_looked_at_without_changing_it(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    database = Database(folder / "a.sqlite")
    with database.transaction(counted=False) as connection:
        connection.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value)")
    database.record({"one": "1"})
    database.close()
    looked = Database(folder / "a.sqlite", read_only=True)
    assert looked.meta("one") == "1"
    looked.close()
    assert [path.name for path in tmp_path.iterdir()] == [name]
