"""Files and folders that are on the disk, not merely on their way there: what is acknowledged must outlast a power cut."""

from __future__ import annotations

import os
from pathlib import Path


def publish(aside: Path, file: Path) -> None:
    """Give a finished file its name in one step: after a crash at any point there is the old file or the new one, whole."""
    flush(aside)
    aside.replace(file)
    flush(file.parent)


def flush(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
