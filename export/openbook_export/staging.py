"""A folder that appears whole or not at all: written beside its destination, flushed to disk, then renamed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from openbook_server.durable import flush

from openbook_export.errors import OutputExists


@contextlib.contextmanager
def staged(destination: Path, *, is_ours: Callable[[Path], bool], force: bool) -> Iterator[Path]:
    """A temporary folder that becomes `destination` when the block ends, and vanishes when it raises.

    Args:
        is_ours: whether a folder is of this kind and holds nothing else; no other is ever replaced.
        force: replace an existing folder of this kind. The old one stays in use until the new one is complete.

    Raises:
        OutputExists: something stands at `destination` that must not be replaced.
    """
    _clear(destination)
    _require_free(destination, is_ours, force)
    destination.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    lock = os.open(aside, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: then nobody else gets one, and nothing is cleared
            fcntl.flock(lock, fcntl.LOCK_EX)
        new = aside / "new"
        new.mkdir()
        yield new
        for file in new.iterdir():
            flush(file)
        flush(new)
        _require_free(destination, is_ours, force)
        if destination.exists():
            destination.rename(aside / "old")
        new.rename(destination)
        flush(destination.parent)
    finally:
        old = aside / "old"
        if old.exists() and not destination.exists():  # stopped between the two renames
            old.rename(destination)
        shutil.rmtree(aside, ignore_errors=True)
        os.close(lock)


def _clear(destination: Path) -> None:
    """Remove what processes left that were killed on the way to `destination`, and give back the folder that one had moved aside."""
    name = re.compile(re.escape(f".{destination.name}-") + "[a-z0-9_]{8}")  # as tempfile makes them
    for aside in list(destination.parent.iterdir()) if destination.parent.is_dir() else ():
        if name.fullmatch(aside.name) and aside.is_dir() and not aside.is_symlink():
            with contextlib.suppress(OSError):  # its process lives, or ended just now, or there are no locks here
                _clear_one(aside, destination)


def _clear_one(aside: Path, destination: Path) -> None:
    held = {entry.name for entry in aside.iterdir()}
    if not held or not held <= {"new", "old"}:  # a process locks its folder before it puts anything into it
        return
    lock = os.open(aside, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a lock ends with its process
        if "old" in held and not destination.exists():
            (aside / "old").rename(destination)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        os.close(lock)


def _require_free(destination: Path, is_ours: Callable[[Path], bool], force: bool) -> None:
    if not destination.exists() and not destination.is_symlink():
        return
    if destination.exists() and destination.samefile(Path.cwd()):
        raise OutputExists(f"{destination} is the current folder, which a new one would take the place of; name a folder in it")
    if destination.is_dir() and not destination.is_symlink():
        if not any(destination.iterdir()):
            return
        if is_ours(destination):
            if force:
                return
            raise OutputExists(f"{destination} holds a bundle already; --force replaces it")
    raise OutputExists(f"{destination} exists and is no bundle, or holds other things beside one; choose another name, or remove it")
