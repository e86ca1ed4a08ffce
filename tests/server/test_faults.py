"""What may go wrong around a knowledge base: kills, full disks, folders that cannot be written, clocks that go backwards."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from openbook_server.knowledge import Document, KnowledgeBase, Passage, SearchOptions
from openbook_server.knowledge.embedded import EmbeddedKnowledgeBase

DIM = 16
# A process that is killed at random points: for each line "number" on its input it forks a writer, which stores documents from that
# number on, three a transaction, and prints the first number of each that was acknowledged.
WRITER = """
import os, sys, pathlib
import numpy as np
sys.path[:0] = {path!r}
from openbook_server.knowledge import Document, Passage
from openbook_server.knowledge.embedded import EmbeddedKnowledgeBase

def write(number, out):
    kb = EmbeddedKnowledgeBase(pathlib.Path({folder!r}), fingerprint="f" * 64, dim=16, create=True, flat_limit=20)
    while True:
        ids = [f"d{{number + n}}" for n in range(3)]
        vectors = np.random.default_rng(number).normal(size=(3, 16)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        documents = [(Document(id=i, text="w" + i), "d") for i in ids]
        kb.replace_documents(documents, [Passage(id=i + "#0", document_id=i, text="w" + i, start=0) for i in ids], vectors)
        os.write(out, f"{{number}}\\n".encode())
        number += 3
        if number % 60 == 0:
            kb.snapshot()

for line in sys.stdin:
    read, out = os.pipe()
    child = os.fork()
    if not child:
        write(int(line), out)
    os.close(out)
    print(child, read, flush=True)
    os.waitpid(child, 0)
    os.close(read)
    print("dead", flush=True)
"""


def opened(folder: Path) -> KnowledgeBase:
    return EmbeddedKnowledgeBase(folder, fingerprint="f" * 64, dim=DIM, create=True, flat_limit=20)


def found(knowledge_base: KnowledgeBase, question: str) -> list[str]:
    [hits] = knowledge_base.search([question], None, SearchOptions(top_k=5, mode="lexical"))
    return [hit.passage.document_id for hit in hits]


def kill_loop(folder: Path, kills: int) -> None:
    """Kill a writer at random points, again and again; nothing it acknowledged may be missing at the next start."""
    rng = random.Random(kills)
    script = WRITER.format(path=sys.path, folder=str(folder))
    acknowledged: list[int] = []
    query = np.eye(DIM, dtype=np.float32)[:1]
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as forks:
        assert forks.stdin is not None
        assert forks.stdout is not None
        for number in range(kills):
            print(acknowledged[-1] + 3 if acknowledged else 0, file=forks.stdin, flush=True)
            child, pipe = map(int, forks.stdout.readline().split())
            with open(f"/proc/{forks.pid}/fd/{pipe}", "rb", buffering=0) as acknowledgements:
                data, wanted = b"", rng.randrange(1, 25)
                while data.count(b"\n") < wanted:
                    data += acknowledgements.read(64)
                os.kill(child, 9)
                while more := acknowledgements.read(4_096):
                    data += more
            acknowledged += [int(line) for line in data.split()]
            assert forks.stdout.readline() == "dead\n"
            knowledge_base = opened(folder)
            for first in (acknowledged[0], acknowledged[-1], rng.choice(acknowledged)):
                for at in range(first, first + 3):
                    assert found(knowledge_base, f"wd{at}") == [f"d{at}"]
            counts = knowledge_base.counts()
            assert counts.documents == counts.passages >= 3 * len(acknowledged)
            if number % 20 == 0 or number == kills - 1:
                [hits] = knowledge_base.search([""], query, SearchOptions(top_k=100_000, mode="dense"))
                assert len(hits) == counts.passages
            knowledge_base.close()
        forks.stdin.close()


def test_an_acknowledged_write_survives_two_hundred_kills(tmp_path: Path) -> None:
    kill_loop(tmp_path / "kb", 200)


@pytest.mark.slow
def test_acknowledged_writes_survive_a_thousand_kills(tmp_path: Path) -> None:
    kill_loop(tmp_path / "kb", 1_000)


# Fills a disk: no file may grow beyond the limit, which is lifted again afterwards. Prints what was acknowledged, then what failed.
FULL_DISK = """
import pathlib, resource, sys
import numpy as np
sys.path[:0] = {path!r}
from openbook_server.errors import KnowledgeBaseDamaged
from openbook_server.knowledge import Document, Passage
from openbook_server.knowledge.embedded import EmbeddedKnowledgeBase

kb = EmbeddedKnowledgeBase(pathlib.Path({folder!r}), fingerprint="f" * 64, dim=16, create=True, flat_limit=20)
def store(number):
    vector = np.eye(16, dtype=np.float32)[number % 16 : number % 16 + 1]
    id_, text = f"d{{number}}", f"w{{number}} " + "filler " * 2_000
    kb.replace_documents([(Document(id=id_, text=text), "d")], [Passage(id=id_ + "#0", document_id=id_, text=text, start=0)], vector)
    print("stored", number)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
number = 0
try:
    while True:
        store(number)
        number += 1
except KnowledgeBaseDamaged as error:
    print("failed", error)
try:
    kb.snapshot()
except KnowledgeBaseDamaged as error:
    print("snapshot", error)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
store(number)
kb.snapshot()
kb.close()
"""


def test_a_full_disk_fails_a_write_whole_and_loses_none_before_or_after_it(tmp_path: Path) -> None:
    script = FULL_DISK.format(path=sys.path, folder=str(tmp_path / "kb"))
    lines = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
    stored = [int(line.split()[1]) for line in lines if line.startswith("stored")]
    [failed] = [line for line in lines if line.startswith("failed")]
    assert "the disk has room" in failed
    assert len(stored) > 10
    knowledge_base = opened(tmp_path / "kb")
    assert knowledge_base.counts().documents == len(stored)
    for number in stored:
        assert found(knowledge_base, f"w{number}") == [f"d{number}"]
    knowledge_base.close()


@contextmanager
def unprivileged_folder() -> Iterator[Path]:
    """A folder that a user who is not root can reach but not write."""
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)
        yield folder
    finally:
        shutil.rmtree(folder)


def test_a_folder_that_cannot_be_written_is_refused_with_the_way_out() -> None:
    script = """
import pathlib, sys
sys.path[:0] = {path!r}
from openbook_server.errors import KnowledgeBaseDamaged
from openbook_server.knowledge.embedded import EmbeddedKnowledgeBase
import os
if os.geteuid() == 0:
    os.setuid(65534)
for create in (True, False):
    try:
        EmbeddedKnowledgeBase(pathlib.Path({folder!r}), fingerprint="f" * 64, dim=16, create=create)
    except KnowledgeBaseDamaged as error:
        print(error)
"""
    with unprivileged_folder() as parent:
        opened(parent / "kb").close()
        for file in [parent / "kb", *(parent / "kb").iterdir()]:
            file.chmod(0o555 if file.is_dir() else 0o444)
        code = script.format(path=sys.path, folder=str(parent / "kb"))
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
        (parent / "kb").chmod(0o755)
        assert len(said) == 2
        assert all("cannot be written" in line and str(parent / "kb") in line for line in said)
        assert all("a server that takes no writes needs it, too" in line for line in said)
        for file in (parent / "kb").iterdir():
            file.chmod(0o644)
        opened(parent / "kb").close()


def test_a_folder_that_cannot_be_read_is_refused_with_the_way_out() -> None:
    script = """
import os, pathlib, sys
sys.path[:0] = {path!r}
from openbook_server.errors import KnowledgeBaseDamaged
from openbook_server.knowledge.embedded import EmbeddedKnowledgeBase
from openbook_server.knowledge.inventory import look
if os.geteuid() == 0:
    os.setuid(65534)
folder = pathlib.Path({folder!r})
for opened in (lambda: EmbeddedKnowledgeBase(folder, fingerprint="f" * 64, dim=16), lambda: look(folder).__enter__()):
    try:
        opened()
    except KnowledgeBaseDamaged as error:
        print(error)
"""
    for mode in (0o000, 0o444, 0o111):
        with unprivileged_folder() as parent:
            opened(parent / "kb").close()
            (parent / "kb").chmod(mode)
            code = script.format(path=sys.path, folder=str(parent / "kb"))
            said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
            (parent / "kb").chmod(0o755)
            assert said == [f"{parent / 'kb'} cannot be read: Permission denied; give this user the right to read it"] * 2


def test_of_two_snapshots_the_later_sequence_is_taken_whatever_the_clock_says(tmp_path: Path) -> None:
    older = tmp_path / "older"
    for run in range(2):
        knowledge_base = opened(tmp_path / "kb")
        store_rows(knowledge_base, range(100 * run, 100 * run + 100))
        knowledge_base.snapshot()
        knowledge_base.close()
        if run == 0:
            shutil.copytree(tmp_path / "kb", older)
    for file in older.glob("index-*"):
        shutil.copy(file, tmp_path / "kb" / file.name)  # as if the removal of the old one had been cut off
    for file in (tmp_path / "kb").glob("index-*"):
        os.utime(file, (2e9, 2e9) if (older / file.name).exists() else (1, 1))
    knowledge_base = opened(tmp_path / "kb")
    assert knowledge_base._saved == knowledge_base.sequence
    assert knowledge_base.graph_rows == 200
    knowledge_base.close()


def store_rows(knowledge_base: KnowledgeBase, numbers: range) -> None:
    vectors = np.random.default_rng(numbers.start).normal(size=(len(numbers), DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    documents = [(Document(id=f"d{number}", text="x"), "d") for number in numbers]
    passages = [Passage(id=f"d{number}#0", document_id=f"d{number}", text="x", start=0) for number in numbers]
    knowledge_base.replace_documents(documents, passages, vectors)
