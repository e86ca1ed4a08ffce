"""A folder that appears whole or not at all, also beside what a killed process left."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest
from openbook_export.errors import OutputExists
from openbook_export.staging import staged


def left(parent: Path, *parts: str) -> Path:
    """What a process leaves that is killed while it writes parent/"out"."""
    aside = parent / ".out-abcd_123"
    for part in parts:
        (aside / part).mkdir(parents=True)
        (aside / part / "file").write_text(part)
    return aside


def write(destination: Path, *, force: bool = False) -> None:
    with staged(destination, is_ours=lambda folder: True, force=force) as folder:
        (folder / "file").write_text("written")


@pytest.mark.parametrize("parts", [("new",), ("new", "old")])
def test_what_a_killed_process_left_is_removed(tmp_path: Path, parts: tuple[str, ...]) -> None:
    left(tmp_path, *parts)
    write(tmp_path / "out", force=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "written"


def test_the_folder_that_a_killed_process_had_moved_aside_comes_back(tmp_path: Path) -> None:
    left(tmp_path, "new", "old")
    with pytest.raises(OutputExists, match="--force replaces it"):
        write(tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "old"


def test_what_a_process_still_writes_stays(tmp_path: Path) -> None:
    with staged(tmp_path / "out", is_ours=lambda folder: True, force=False) as folder:
        write(tmp_path / "out")
        assert folder.is_dir()
        (folder / "file").write_text("later")
        aside = left(tmp_path, "new")
        lock = os.open(aside, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        write(tmp_path / "out", force=True)
        assert aside.is_dir()
        os.close(lock)
        (tmp_path / "out" / "file").unlink()  # an empty folder may be taken


def test_a_folder_that_is_only_called_alike_stays(tmp_path: Path) -> None:
    (left(tmp_path, "new") / "notes").write_text("mine")
    (tmp_path / ".out-other").mkdir()
    write(tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".out-abcd_123", ".out-other", "out"]
